/** The shell around the machine, with a socket in the same process: what a test must see or say. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { Client, State, StewardError } from "../../../edge/static/steward.js";

const vectors = JSON.parse(
  readFileSync(new URL("../../../protos/testdata/client_session.json", import.meta.url), "utf8"),
);

const DEADLINE = { timeout: 5_000 };

/** An edge of one process: sockets that the test speaks for, and an answer to each ticket. */
function edge(tickets = []) {
  const sockets = [];
  const waiting = [];
  class Socket extends EventTarget {
    constructor(address, protocols) {
      super();
      Object.assign(this, { address: new URL(address), protocols, readyState: 0, sent: [], shut: null });
      if (waiting.length) waiting.shift()(this);
      else sockets.push(this);
    }
    send(text) {
      this.sent.push(JSON.parse(text));
    }
    close(code) {
      this.shut = code;
      this.readyState = 2;
    }
    open(ready = {}) {
      this.readyState = 1;
      this.dispatchEvent(new Event("open"));
      this.say({ ...vectors.ready, token_expires_at: "2999-01-01T00:00:00.000Z", ...ready });
    }
    say(frame) {
      this.dispatchEvent(new MessageEvent("message", { data: typeof frame === "string" ? frame : JSON.stringify(frame) }));
    }
    end(code, reason = "") {
      this.readyState = 3;
      this.dispatchEvent(Object.assign(new Event("close"), { code, reason }));
    }
  }
  const asked = [];
  return {
    asked,
    /** The next socket that the client dials. */
    dialled: () => (sockets.length ? Promise.resolve(sockets.shift()) : new Promise((resolve) => waiting.push(resolve))),
    options: {
      url: "https://edge.example",
      token: "a.b.c",
      WebSocket: Socket,
      fetch: async (address, { method, headers }) => {
        asked.push({ path: address.pathname, method, authorization: headers.authorization });
        const { status = 200, body = { ticket: `t${asked.length}` }, ...more } = tickets.shift() ?? {};
        return new Response(JSON.stringify(body), { status, headers: more.headers });
      },
    },
  };
}

function event(sequence, more = {}) {
  return { ...vectors.event, sequence, event_id: `e${sequence}`, ...more };
}

function begin(t, tickets, options = {}) {
  const world = edge(tickets);
  const client = new Client({ ...world.options, ...options }).start();
  t.after(() => client.close());
  return { ...world, client };
}

function told(client, type) {
  return new Promise((resolve) => client.addEventListener(type, ({ detail }) => resolve(detail), { once: true }));
}

test("merged deltas are asked for only on demand, and come as one event", DEADLINE, async (t) => {
  const plain = begin(t, [], { auth: "subprotocol" });
  assert.equal((await plain.dialled()).address.searchParams.get("merge"), null);
  const { client, dialled } = begin(t, [], { auth: "subprotocol", merge: true });
  const socket = await dialled();
  assert.equal(socket.address.searchParams.get("merge"), "1");
  const events = [];
  client.addEventListener("event", ({ detail }) => events.push(detail));
  socket.open({ merge: true });
  assert.equal(client.ready.merge, true);
  socket.say(event(6));
  socket.say(event(9, { from_sequence: 7, data: { message_id: "t1", delta: "yz!" } }));
  assert.deepEqual(events.map(({ sequence, data }) => [sequence, data.delta]), [[6, "x"], [9, "yz!"]]);
  assert.equal(client.position.sequence, 9);
  socket.end(4004, "SLOW_CONSUMER");
  client.retry();
  assert.equal((await dialled()).address.search, `?after=9&stream=s1&client=${socket.address.searchParams.get("client")}&merge=1`);
});

test("a ticket is fetched with the token and used once per dial, the token never is in the address", DEADLINE, async (t) => {
  const { client, dialled, asked } = begin(t, [], { position: { stream_id: "s1", sequence: 3 }, clientId: "tab" });
  const first = await dialled();
  assert.deepEqual(asked, [{ path: "/v1/tickets", method: "POST", authorization: "Bearer a.b.c" }]);
  assert.equal(first.address.href, "wss://edge.example/v1/connect?after=3&stream=s1&client=tab&ticket=t1");
  assert.deepEqual(first.protocols, ["steward.v1"]);
  first.open({ resume: "resumed" });
  first.say(event(4));
  first.end(1006);
  client.retry();
  const second = await dialled();
  assert.equal(second.address.searchParams.get("after"), "4");
  assert.equal(second.address.searchParams.get("ticket"), "t2");
});

test("with several addresses each dial after the first goes to the next one", DEADLINE, async (t) => {
  const url = ["https://one.example", "https://two.example"];
  const { client, dialled } = begin(t, [], { url });
  const hosts = [];
  for (let dial = 0; dial < 3; dial += 1) {
    const socket = await dialled();
    hosts.push(socket.address.host);
    socket.open();
    socket.end(1006);
    client.retry();
  }
  assert.deepEqual(hosts, ["one.example", "two.example", "one.example"]);
});

test("as a subprotocol the token needs no ticket", DEADLINE, async (t) => {
  const { dialled, asked } = begin(t, [], { auth: "subprotocol" });
  const socket = await dialled();
  assert.deepEqual(socket.protocols, ["steward.v1", "steward.bearer.a.b.c"]);
  assert.equal(socket.address.searchParams.has("ticket"), false);
  assert.deepEqual(asked, []);
});

test("a final close ends the session, its iterators and its sends", DEADLINE, async (t) => {
  const { client, dialled } = begin(t);
  const socket = await dialled();
  socket.open();
  const failure = { name: "StewardError", reason: "USER_EVICTED" };
  const reading = assert.rejects(client.events().next(), failure);
  const sending = assert.rejects(client.send("never accepted"), failure);
  const ended = told(client, "ended");
  socket.end(4503);
  assert.deepEqual(await ended, { reason: "USER_EVICTED" });
  await Promise.all([reading, sending]);
  assert.equal(client.state, State.CLOSED);
  await assert.rejects(client.send("too late"), (error) => error instanceof StewardError);
});

test("Retry-After of a refused ticket is obeyed, in the body or the header", DEADLINE, async (t) => {
  for (const answer of [
    { status: 503, body: { reason: "EDGE_DRAINING", message: "draining", retry_after_ms: 4_000 } },
    { status: 429, body: { reason: "RATE_LIMITED", message: "slower" }, headers: { "retry-after": "4" } },
  ]) {
    const { client } = begin(t, [answer]);
    const { reason, retryAt } = await told(client, "state");
    assert.equal(reason, answer.body.reason);
    const wait = retryAt - Date.now();
    assert.ok(wait > 3_000 && wait <= 4_250, String(wait));
    client.close();
  }
});

test("after a gap the socket is shut, and what it says later is not heard", DEADLINE, async (t) => {
  const { client, dialled } = begin(t);
  const seen = [];
  client.addEventListener("event", ({ detail }) => seen.push(detail.sequence));
  const first = await dialled();
  first.open();
  first.say(event(6));
  first.say(event(8));
  assert.equal(first.shut, 3000);
  first.say(event(7));
  first.end(1000);
  client.retry();
  const second = await dialled();
  assert.equal(second.address.searchParams.get("after"), "6");
  second.open({ resume: "resumed", sequence: 8 });
  first.say(event(9));
  first.end(4503);
  assert.equal(client.state, State.OPEN);
  for (const sequence of [7, 8]) second.say(event(sequence));
  assert.deepEqual(seen, [6, 7, 8]);
});

test("a message goes again under its id until it is accepted, and ask follows its run", DEADLINE, async (t) => {
  const { client, dialled } = begin(t);
  const asking = client.ask("hi", { id: "m1", threadId: "t2" });
  const first = await dialled();
  first.open();
  const frame = { type: "user_message", id: "m1", content: "hi", thread_id: "t2" };
  assert.deepEqual(first.sent, [frame]);
  first.say(event(6, { type: "user_message", run_id: "r9", data: { id: "m1", content: "hi" } }));
  first.end(1006);
  client.retry();
  const second = await dialled();
  second.open({ resume: "resumed", sequence: 7 });
  assert.deepEqual(second.sent, [frame]);
  second.say(event(7, { run_id: "other" }));
  second.say({ type: "accepted", id: "m1", run_id: "r9", sequence: 6, duplicate: true });
  second.say(event(8, { type: "agent_completed", run_id: "r9", data: { outcome: "success", response: "", duration_ms: 1 } }));
  const run = await asking;
  const sequences = [];
  for await (const { sequence } of run) sequences.push(sequence);
  assert.deepEqual(sequences, [6, 8]);
  assert.equal(run.accepted.duplicate, true);
});

test("text that is no JSON, and bytes, are not passed on", DEADLINE, async (t) => {
  for (const frame of ["{", "[]", new Uint8Array(3)]) {
    const { client, dialled } = begin(t);
    const socket = await dialled();
    socket.open();
    if (typeof frame === "string") socket.say(frame);
    else socket.dispatchEvent(new MessageEvent("message", { data: frame }));
    assert.equal(socket.shut, 3000);
    assert.equal(client.state, State.RESUMING);
    client.close();
  }
});
