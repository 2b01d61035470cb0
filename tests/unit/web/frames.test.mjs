/** What the SDK would write, against the vectors that the edge is checked by. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { findFault } from "../../../edge/static/frames.js";

const vectors = JSON.parse(
  readFileSync(new URL("../../../protos/testdata/frames.json", import.meta.url), "utf8"),
);

/** Text that an SDK can't make from a value, or whose size only the server limits. */
function parsed({ text, binary, close }) {
  if (binary !== undefined || close !== undefined) return undefined;
  const whole = typeof text === "string" ? text : text.repeat.map(([part, n]) => part.repeat(n)).join("");
  try {
    return JSON.parse(whole);
  } catch {
    return undefined;
  }
}

const cases = vectors.cases.map((each) => ({ ...each, frame: parsed(each) })).filter((each) => each.frame !== undefined);

test("most vectors are values that a program could pass", () => assert.ok(cases.length > 50));

for (const { name, frame, means } of cases) {
  test(`vector: ${name}`, () => {
    if (means === undefined) assert.notEqual(findFault(frame), null);
    else assert.equal(findFault(frame), null);
  });
}

test("what a valid vector means is valid too", () => {
  for (const { means } of cases) if (means !== undefined) assert.equal(findFault(means), null);
});
