/** The session machine against the shared vectors, and what the vectors do not say. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { ClientSession, State } from "../../../edge/static/client_session.js";

const vectors = JSON.parse(
  readFileSync(new URL("../../../protos/testdata/client_session.json", import.meta.url), "utf8"),
);

function commandOf(on) {
  if (on.type !== "received") return on;
  if (on.ready !== undefined) return { type: "received", frame: { ...vectors.ready, ...on.ready } };
  if (on.event !== undefined) {
    const event = { ...vectors.event, ...on.event };
    return { type: "received", frame: { event_id: `e${event.sequence}`, ...event } };
  }
  return on;
}

function assertIncludes(actual, expected, where) {
  for (const [name, value] of Object.entries(expected)) {
    assert.deepEqual(actual[name], value, `${where}: ${name} of ${JSON.stringify(actual)}`);
  }
}

test("the vectors are there", () => assert.ok(vectors.cases.length > 80));

for (const { name, config = {}, steps } of vectors.cases) {
  test(`vector: ${name}`, () => {
    const session = new ClientSession(config);
    steps.forEach((step, index) => {
      const where = `step ${index} at ${step.at}`;
      const effects = session.handle(step.at, commandOf(step.on), step.random ?? 0);
      assert.equal(
        effects.map((effect) => effect.type).join(),
        step.effects.map((effect) => effect.type).join(),
        where,
      );
      step.effects.forEach((expected, at) => {
        assertIncludes(effects[at], expected, where);
        if (expected.type === "open") {
          assert.equal(effects[at].after, expected.after, where);
          assert.equal(effects[at].stream, expected.stream, where);
        }
      });
      if ("state" in step) assert.equal(session.state, step.state, where);
      if ("deadline" in step) assert.equal(session.nextDeadline(), step.deadline, where);
    });
  });
}

/** A machine that is open at 10 ms, after sequence 5 of s1. */
function opened(config = {}) {
  const session = new ClientSession(config);
  session.handle(0, { type: "start" });
  session.handle(10, { type: "received", frame: vectors.ready });
  return session;
}

test("retry ends the wait at once", () => {
  const session = opened();
  session.handle(20, { type: "closed", code: 1006 }, 0.999);
  assert.ok(session.dialAt > 20);
  const effects = session.handle(30, { type: "retry" });
  assert.deepEqual(effects, [{ type: "open", new_token: false, after: 5, stream: "s1" }]);
  assert.deepEqual(session.handle(31, { type: "retry" }), []);
});

test("a new token stays wanted while no answer comes", () => {
  const session = opened();
  session.handle(20, { type: "closed", code: 4001 });
  assert.equal(session.handle(20, { type: "tick" })[0].new_token, true);
  session.handle(21, { type: "refused", status: 0 });
  assert.equal(session.handle(21, { type: "tick" })[0].new_token, true);
});

test("events in any disorder are delivered in order and once", () => {
  let seed = 7;
  const random = () => {
    seed = (seed * 1103515245 + 12345) % 2147483648;
    return seed / 2147483648;
  };
  const event = (sequence) => ({ ...vectors.event, sequence, event_id: `e${sequence}` });
  const session = opened();
  const seen = [];
  let now = 10;
  let at = 6;
  while (seen.length < 300) {
    now += 1;
    let effects;
    if (session.state === State.OPEN) {
      const choice = random();
      // Mostly the next one; sometimes a repeat, a hole, or a lost connection.
      if (choice < 0.05) effects = session.handle(now, { type: "closed", code: 1006 }, random());
      else {
        const skew = choice < 0.15 ? -3 : choice < 0.25 ? 2 : 0;
        effects = session.handle(now, { type: "received", frame: event(Math.max(1, at + skew)) }, random());
        if (skew === 0) at += 1;
      }
    } else {
      now = Math.max(now, session.nextDeadline());
      effects = session.handle(now, { type: "tick" }, random());
      const open = effects.find((effect) => effect.type === "open");
      if (open) {
        at = open.after + 1;
        const frame = { ...vectors.ready, resume: "resumed", sequence: open.after };
        effects = session.handle(now, { type: "received", frame });
      }
    }
    for (const effect of effects) if (effect.type === "deliver") seen.push(effect.sequence);
  }
  assert.deepEqual(seen, seen.map((_, index) => index + 6));
});
