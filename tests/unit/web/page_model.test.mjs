/** What the page makes of events, text and values, without a page. */

import assert from "node:assert/strict";
import test from "node:test";

import { parseInlines, parseMarkdown } from "../../../edge/static/chat/markdown.js";
import { answerTexts, ThreadModel } from "../../../edge/static/chat/thread_model.js";
import { formatDuration, inlineValue, isTable } from "../../../edge/static/chat/values.js";

let sequence = 0;
function event(type, data, more = {}) {
  sequence += 1;
  return { type, sequence, epoch: 1, stream_id: "s1", thread_id: "main", run_id: "r1", agent: "demo", data, ...more };
}

function run(...parts) {
  const model = new ThreadModel("main");
  model.merge(parts);
  return model.items[0];
}

test("a run has an entry for each of the five events, in order", () => {
  const shown = run(
    event("user_message", { id: "m1", content: "hi" }),
    event("agent_started", { input: "hi", attempt: 1 }),
    event("agent_thinking", { thought: "Hm", delta: false }),
    event("tool_executing", { tool_call_id: "c1", tool_name: "sql", arguments: {} }),
    event("tool_completed", { tool_call_id: "c1", tool_name: "sql", success: true, result: 1, duration_ms: 2 }),
    event("agent_text", { message_id: "t1", delta: "South " }),
    event("agent_text", { message_id: "t1", delta: "won." }),
    event("agent_completed", { outcome: "success", response: "South won.", duration_ms: 9 }),
  );
  assert.deepEqual(
    shown.entries.map((entry) => entry.kind),
    ["started", "thinking", "tool_executing", "tool_completed", "completed"],
  );
  assert.deepEqual(answerTexts(shown), [{ key: "t1", text: "South won." }]);
  assert.equal(shown.status, "done");
  assert.ok(shown.entries.every((entry) => !entry.open));
});

test("merged deltas and the events they are made of give the same text, whichever comes first", () => {
  const begin = sequence;
  const start = event("agent_started", { input: "hi", attempt: 1 });
  const deltas = "abcdef".split("").map((delta) => event("agent_text", { message_id: "t1", delta }));
  const more = event("agent_text", { message_id: "t1", delta: "g" });
  const merged = { ...deltas[5], from_sequence: deltas[1].sequence, data: { message_id: "t1", delta: "bcdef" } };
  const textOf = (...pages) => {
    const model = new ThreadModel("main");
    for (const page of pages) model.merge(page);
    assert.equal(model.oldest, begin + 1);
    return model.items[0].texts[0].text;
  };
  assert.equal(textOf([start, deltas[0]], [merged], [more]), "abcdefg");
  assert.equal(textOf([start, ...deltas], [merged, more]), "abcdefg");
  assert.equal(textOf([start, ...deltas.slice(0, 3)], [merged], [more]), "abcdefg");
  assert.equal(textOf([merged, more], [start, ...deltas]), "abcdefg");
  assert.equal(textOf([merged], [start, ...deltas, more], [merged]), "abcdefg");
  const model = new ThreadModel("main");
  model.merge([start, deltas[0], merged]);
  assert.equal(model.merge([...deltas, merged]), false);
});

test("deltas of a thought are one entry, whole thoughts are entries of their own", () => {
  const shown = run(
    event("agent_started", { input: "hi", attempt: 1 }),
    event("agent_thinking", { thought: "I ", delta: true }),
    event("agent_thinking", { thought: "think", delta: true }),
    event("agent_thinking", { thought: "Looking", delta: false }),
  );
  assert.deepEqual(shown.entries.slice(1).map((entry) => entry.thought), ["I think", "Looking"]);
});

test("a response that repeats the text is not shown twice", () => {
  const said = event("agent_text", { message_id: "t1", delta: "South sold the most. " });
  const done = (response) => event("agent_completed", { outcome: "success", response, duration_ms: 1 });
  const texts = (response) => answerTexts(run(said, done(response))).map((part) => part.text);
  assert.deepEqual(texts("South sold the most."), ["South sold the most. "]);
  assert.deepEqual(texts("South sold the most. And West."), ["South sold the most. And West."]);
  assert.deepEqual(texts("Done."), ["South sold the most. ", "Done."]);
  assert.deepEqual(answerTexts(run(done("Alone"))).map((part) => part.text), ["Alone"]);
});

test("a pending message goes when its event comes, whichever is first", () => {
  const model = new ThreadModel("main");
  model.addPending("m1", "hi");
  assert.equal(model.pending.size, 1);
  model.merge([event("user_message", { id: "m1", content: "hi" })]);
  assert.equal(model.pending.size, 0);
  model.addPending("m1", "hi");
  assert.equal(model.pending.size, 0);
});

test("events of other threads do not show, moves of the manager do", () => {
  const model = new ThreadModel("main");
  model.merge([
    event("user_message", { id: "m1", content: "hi" }, { thread_id: "other" }),
    event("manager_moved", { from_node: "a", to_node: "b", cause: "drain", gap_ms: 3 }, { thread_id: undefined, run_id: undefined }),
  ]);
  assert.deepEqual(model.items.map((item) => item.kind), ["notice"]);
});

test("a page that begins inside a run says so", () => {
  const model = new ThreadModel("main");
  const first = event("user_message", { id: "m1", content: "hi" });
  model.merge([event("agent_text", { message_id: "t1", delta: "x" })]);
  assert.equal(model.isCutOff, true);
  model.merge([first]);
  assert.equal(model.isCutOff, false);
});

const kinds = (text) => parseMarkdown(text).map((block) => block.type);

test("blocks of markdown", () => {
  assert.deepEqual(kinds("# Title\n\ntext\nmore\n\n- a\n- b\n\n1. c\n\n> q\n\n---\n\n```sql\nx\n```"), [
    "heading", "paragraph", "list", "list", "quote", "rule", "code",
  ]);
  const [table] = parseMarkdown("| a | b |\n|---|---:|\n| 1 | 2 |\n| 3 |");
  assert.equal(table.type, "table");
  assert.deepEqual(table.align, ["start", "end"]);
  assert.equal(table.rows.length, 2);
  assert.equal(table.rows[1].length, 2);
});

test("a fence that is still open is code already", () => {
  const [block] = parseMarkdown("```js\nlet a = `b`;");
  assert.deepEqual([block.type, block.text, block.language], ["code", "let a = `b`;", "js"]);
});

test("lists nest", () => {
  const [list] = parseMarkdown("- a\n  - b\n  - c\n- d");
  assert.equal(list.items.length, 2);
  assert.deepEqual(list.items[0].map((block) => block.type), ["paragraph", "list"]);
});

test("inline marks", () => {
  const types = (text) => parseInlines(text).map((inline) => inline.type);
  assert.deepEqual(types("a **b** *c* `d*e*` [f](https://g.example) h"), [
    "text", "strong", "text", "emphasis", "text", "code", "text", "link", "text",
  ]);
  assert.deepEqual(types("2 * 3 * 4 and snake_case_name"), ["text"]);
});

test("links go to the web and to mail only", () => {
  for (const target of ["javascript:alert(1)", "data:text/html,x", "//x.example", "JaVaScRiPt:1"]) {
    const links = parseInlines(`[x](${target})`).filter((inline) => inline.type === "link");
    assert.deepEqual(links, [], target);
  }
});

test("hostile markdown is quick", () => {
  const began = performance.now();
  for (const piece of ["**", "`", "[", "*a ", "_", "| - ", "> ", "- ", "![](", "~~~\n"]) {
    parseMarkdown(piece.repeat(20_000));
  }
  assert.ok(performance.now() - began < 2_000, `${performance.now() - began} ms`);
});

test("every block keeps its source, so that only the last is drawn again", () => {
  const before = parseMarkdown("one\n\ntwo").map((block) => block.source);
  const after = parseMarkdown("one\n\ntwo and more").map((block) => block.source);
  assert.equal(before[0], after[0]);
  assert.notEqual(before[1], after[1]);
});

test("values as people read them", () => {
  assert.equal(inlineValue({ region: "all", limit: 5 }), 'region: "all", limit: 5');
  assert.equal(inlineValue(1080), "1080");
  assert.equal(isTable([{ a: 1 }, { a: 2 }]), true);
  assert.equal(isTable([{ a: 1 }, { b: 2 }]), false);
  assert.equal(isTable([]), false);
  assert.equal(formatDuration(0), "<1 ms");
  assert.equal(formatDuration(999), "999 ms");
  assert.equal(formatDuration(3_120), "3.12 s");
  assert.equal(formatDuration(125_000), "2 min 5 s");
});
