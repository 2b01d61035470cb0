/**
 * Drives the SDK against the server at STEWARD_URL; run by test_javascript.py.
 * Node 20 has its WebSocket behind --experimental-websocket, and loses close codes while frames
 * arrive: what depends on a code is in client.test.mjs.
 */

import assert from "node:assert/strict";
import test from "node:test";

import { Client, newId, State } from "../../../edge/static/steward.js";

const url = process.env.STEWARD_URL;
const token = "scripted.token.value";
const DEADLINE = { timeout: 20_000 };

function control(command) {
  return fetch(`${url}/control`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(command),
  });
}

/** A started client that is closed with its test, also when that fails. */
function connect(t, options = {}) {
  const client = new Client({ url, token, ...options }).start();
  t.after(() => client.close());
  return client;
}

function once(client, type, accept = () => true) {
  return new Promise((resolve) => {
    const listen = ({ detail }) => {
      if (!accept(detail)) return;
      client.removeEventListener(type, listen);
      resolve(detail);
    };
    client.addEventListener(type, listen);
  });
}

test("a run is iterated from its message to its end", DEADLINE, async (t) => {
  const client = connect(t);
  const types = [];
  const run = await client.ask("Which region sold the most?");
  for await (const event of run) types.push(event.type);
  assert.deepEqual(types.filter((type) => type !== "agent_text"), [
    "user_message", "agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_completed",
  ]);
  client.close();
  assert.equal(client.state, State.CLOSED);
});

test("a dropped connection in the middle of a run loses and repeats nothing", DEADLINE, async (t) => {
  const client = connect(t);
  const run = await client.ask("Show the sales of each region as a table");
  const sequences = [];
  let drops = 0;
  for await (const event of run) {
    sequences.push(event.sequence);
    if (event.type === "agent_text" && drops < 3 && sequences.length % 10 === 0) {
      drops += 1;
      await control({ do: "drop" });
    }
  }
  client.close();
  assert.equal(drops, 3);
  assert.deepEqual(sequences, sequences.map((_, index) => sequences[0] + index));
});

test("a message sent without a connection arrives once", DEADLINE, async (t) => {
  const client = connect(t);
  await once(client, "opened");
  await control({ do: "away", seconds: 0.5 });
  await once(client, "state", ({ state }) => state === State.RESUMING);
  const id = newId();
  const sending = client.send("Which region sold the most?", { id });
  assert.equal(client.send("the same id is the same message", { id }), sending);
  const first = await sending;
  const again = await client.send("Which region sold the most?", { id });
  client.close();
  assert.equal(first.duplicate, false);
  assert.deepEqual([again.run_id, again.sequence, again.duplicate], [first.run_id, first.sequence, true]);
});

test("two clients of a user see the same, and a position resumes", DEADLINE, async (t) => {
  const one = connect(t);
  const two = connect(t);
  await Promise.all([once(one, "opened"), once(two, "opened")]);
  const id = newId();
  const cause = once(two, "event", ({ type, data }) => type === "user_message" && data.id === id);
  const done = cause.then(({ run_id: runId }) =>
    once(two, "event", (event) => event.type === "agent_completed" && event.run_id === runId),
  );
  const run = await one.ask("What time is it?", { id });
  const ended = await run.completed();
  assert.deepEqual(await done, ended);
  const position = { ...one.position, sequence: ended.sequence - 3 };
  one.close();
  two.close();
  const later = connect(t, { position });
  const seen = [];
  for await (const event of later.events()) {
    seen.push(event.sequence);
    if (event.sequence === ended.sequence) break;
  }
  assert.deepEqual(seen, [ended.sequence - 2, ended.sequence - 1, ended.sequence]);
});

test("a refused token is asked for anew, once", DEADLINE, async (t) => {
  const asked = [];
  const provider = async (why) => {
    asked.push(why);
    return asked.length === 1 ? "stale.token.value" : token;
  };
  const client = connect(t, { token: provider });
  await once(client, "opened");
  client.close();
  assert.deepEqual(asked, ["start", "refused"]);
  const wrong = connect(t, { token: "wrong.token.value" });
  assert.deepEqual(await once(wrong, "ended"), { reason: "TOKEN_INVALID" });
});

test("cancel ends a run, history and threads are readable", DEADLINE, async (t) => {
  const client = connect(t);
  const run = await client.ask("Show the table", { threadId: "t-history" });
  let last = null;
  for await (const event of run) {
    if (event.type === "tool_executing") run.cancel();
    last = event;
  }
  assert.equal(last.data.outcome, "cancelled");
  const { threads } = await client.threads();
  assert.ok(threads.some((thread) => thread.thread_id === "t-history" && thread.title === "Show the table"));
  const { events } = await client.threadEvents("t-history", { after: 0, limit: 1 });
  assert.deepEqual(events.map((event) => event.type), ["user_message"]);
  assert.equal(typeof (await client.ping()), "number");
});

test("a mistake is an error where it is made", (t) => {
  const client = connect(t);
  assert.throws(() => client.send("x", { overlap: "both" }), TypeError);
  assert.throws(() => client.send("x", { id: "" }), TypeError);
  assert.throws(() => client.cancel({}), TypeError);
});
