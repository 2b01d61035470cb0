/** The stream rules, and the page's model, against recorded streams legal and broken. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { StreamRules } from "../../../edge/static/stream_rules.js";
import { ThreadModel } from "../../../edge/static/chat/thread_model.js";

const vectors = JSON.parse(
  readFileSync(new URL("../../../protos/testdata/streams.json", import.meta.url), "utf8"),
);

export function eventsOf({ events }) {
  return events.map((event) => {
    const whole = { ...vectors.defaults, event_id: `e${event.sequence}`, ...event };
    return Object.fromEntries(Object.entries(whole).filter(([, value]) => value !== null));
  });
}

test("the vectors are there", () => assert.ok(vectors.cases.length > 50));

for (const recording of vectors.cases) {
  const { name, findings, complete = true, interleaving = [] } = recording;
  test(`vector: ${name}`, () => {
    const rules = new StreamRules(interleaving);
    for (const event of eventsOf(recording)) rules.see(event);
    const found = rules.end({ complete }).map(({ kind, sequence }) => ({ kind, sequence }));
    assert.deepEqual(found, findings);
  });
}

const legal = vectors.cases.filter((each) => each.findings.length === 0 && each.events.length > 0);

for (const recording of legal) {
  test(`the page shows the same in whatever pieces it came: ${recording.name}`, () => {
    const events = eventsOf(recording);
    const whole = new ThreadModel("main");
    whole.merge(events);
    const oneByOne = new ThreadModel("main");
    for (const event of events) oneByOne.merge([event]);
    const liveFirst = new ThreadModel("main");
    const middle = Math.floor(events.length / 2);
    for (const event of events.slice(middle)) liveFirst.merge([event]);
    liveFirst.merge(events.slice(0, middle + 1));
    assert.deepEqual(oneByOne.items, whole.items);
    assert.deepEqual(liveFirst.items, whole.items);
  });
}
