/** Paging backwards over what the HTTP interface offers, against a server in 20 lines. */

import assert from "node:assert/strict";
import test from "node:test";

import { History } from "../../../edge/static/chat/history.js";
import { ThreadModel } from "../../../edge/static/chat/thread_model.js";

/** A stream of runs of 40 events in two threads; pages are cut at `most` events, as by size. */
function server({ runs, most, spread = 1 }) {
  const events = [];
  for (let run = 0; run < runs; run += 1) {
    // A long silence in this thread between its halves: other threads hold the numbers.
    const offset = run < runs / 2 ? 0 : spread * 10_000;
    for (let i = 0; i < 40; i += 1) {
      const type = i === 0 ? "user_message" : i === 1 ? "agent_started" : i === 39 ? "agent_completed" : "agent_text";
      const data = { id: `m${run}`, content: "hi", message_id: `t${run}`, delta: "x", outcome: "success" };
      const sequence = 5 + offset + run * 40 + i;
      events.push({ type, sequence, stream_id: "s1", epoch: 1, thread_id: "main", run_id: `r${run}`, data });
    }
  }
  const asked = [];
  return {
    events,
    asked,
    async threadEvents(threadId, { after, limit }) {
      asked.push(after);
      assert.equal(threadId, "main");
      assert.ok(limit >= 1 && limit <= 1_000);
      const size = Math.min(limit, most);
      if (after === undefined) return { stream_id: "s1", events: events.slice(-size) };
      const later = events.filter((event) => event.sequence > after);
      const page = { stream_id: "s1", events: later.slice(0, size) };
      if (later.length > size) page.next = page.events.at(-1).sequence;
      return page;
    },
  };
}

for (const options of [
  { runs: 3, most: 1_000 },
  { runs: 60, most: 1_000 },
  { runs: 60, most: 70 },
  { runs: 40, most: 130, spread: 3 },
]) {
  test(`all of it is reached, each event once: ${JSON.stringify(options)}`, async () => {
    const client = server(options);
    const model = new ThreadModel("main");
    const history = new History(() => client, model);
    await history.load();
    assert.equal(model.isCutOff, false);
    for (let i = 0; history.hasEarlier; i += 1) {
      assert.ok(i < 100, "it comes to an end");
      const before = model.oldest;
      await history.earlier();
      assert.ok(model.oldest < before, "every page brings something");
    }
    assert.deepEqual(model.events, client.events);
    assert.equal(model.items.length, options.runs);
  });
}

test("an empty thread has no earlier events", async () => {
  const history = new History(() => server({ runs: 0, most: 10 }), new ThreadModel("main"));
  await history.load();
  assert.equal(history.isLoaded, true);
  assert.equal(history.hasEarlier, false);
});

test("live events that came first are kept", async () => {
  const client = server({ runs: 4, most: 1_000 });
  const model = new ThreadModel("main");
  const live = { ...client.events.at(-1), sequence: 1_000_000, type: "user_message", run_id: "r9", data: { id: "m9", content: "now" } };
  model.merge([live]);
  await new History(() => client, model).load();
  assert.deepEqual(model.events, [...client.events, live]);
});
