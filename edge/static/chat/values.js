/**
 * JSON values as people read them: short ones in a line, rows as a table, the rest indented.
 * Durations and times too. Shows at most what fits; the whole stays behind a disclosure.
 */

import { el } from "./dom.js";

const INLINE_LIMIT = 64;
const MAX_ROWS = 50;
const MAX_TEXT = 20_000;

/** `340 ms`, `1.24 s`, `2 min 5 s`. */
export function formatDuration(ms) {
  if (!Number.isFinite(ms)) return "";
  if (ms < 1) return "<1 ms";
  if (ms < 1_000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1_000).toFixed(ms < 10_000 ? 2 : 1)} s`;
  const minutes = Math.floor(ms / 60_000);
  return `${minutes} min ${Math.round((ms % 60_000) / 1_000)} s`;
}

/** A value in one line: `"all"`, `12`, `region: "all", limit: 5`. */
export function inlineValue(value) {
  if (value !== null && typeof value === "object" && !Array.isArray(value)) {
    return Object.entries(value)
      .map(([name, field]) => `${name}: ${JSON.stringify(field)}`)
      .join(", ");
  }
  return typeof value === "string" ? value : (JSON.stringify(value) ?? "");
}

/** True for a non-empty list of flat objects with the same few keys: a table. */
export function isTable(value) {
  if (!Array.isArray(value) || value.length === 0) return false;
  const isFlat = (row) =>
    row !== null &&
    typeof row === "object" &&
    !Array.isArray(row) &&
    Object.values(row).every((field) => field === null || typeof field !== "object");
  if (!value.every(isFlat)) return false;
  const keys = Object.keys(value[0]);
  return (
    keys.length > 0 &&
    keys.length <= 12 &&
    value.every((row) => Object.keys(row).length === keys.length && keys.every((key) => key in row))
  );
}

/**
 * A value as a node: a line of code when short, else a disclosure with the whole.
 * @param {unknown} value
 * @param {string} label what the value is, for the disclosure's name
 */
export function valueNode(value, label) {
  const line = inlineValue(value);
  const short = line.length <= INLINE_LIMIT && !line.includes("\n");
  if (short && !isTable(value)) {
    return line === "" ? null : el("code", { class: "value", text: line });
  }
  const text = el("span", { text: summaryText(value, line) });
  const summary = el("summary", { class: "value", "aria-label": label }, text);
  return el("details", { class: "value-more" }, summary, wholeNode(value));
}

function summaryText(value, line) {
  if (isTable(value)) return value.length === 1 ? "1 row" : `${value.length} rows`;
  return line.slice(0, 2 * INLINE_LIMIT).replace(/\s+/g, " ").trim();
}

/** The whole value: a table of rows, the fields of an object, text as it is, or indented JSON. */
export function wholeNode(value) {
  if (isTable(value)) return tableNode(value);
  const isFields = value !== null && typeof value === "object" && !Array.isArray(value);
  if (isFields && Object.values(value).some((field) => typeof field === "string")) {
    const rows = Object.entries(value).map(([name, field]) =>
      el("div", {}, el("dt", { text: name }), el("dd", {}, textNode(field))),
    );
    return el("dl", { class: "fields" }, ...rows);
  }
  return textNode(value);
}

function textNode(value) {
  const text = typeof value === "string" ? value : JSON.stringify(value, null, 2);
  const shown = text.length > MAX_TEXT ? `${text.slice(0, MAX_TEXT)}\n… ${text.length} characters` : text;
  return el("pre", { tabindex: "0" }, el("code", { text: shown }));
}

function tableNode(rows) {
  const keys = Object.keys(rows[0]);
  const isNumber = (key) => rows.every((row) => typeof row[key] === "number");
  const align = new Map(keys.map((key) => [key, isNumber(key) ? "end" : "start"]));
  const cell = (tag, key, text) => el(tag, { text, data: { align: align.get(key) } });
  const body = rows.slice(0, MAX_ROWS).map((row) =>
    el("tr", {}, ...keys.map((key) => cell("td", key, row[key] === null ? "" : String(row[key])))),
  );
  const table = el(
    "table",
    {},
    el("thead", {}, el("tr", {}, ...keys.map((key) => cell("th", key, key)))),
    el("tbody", {}, ...body),
  );
  const rest = rows.length - body.length;
  const more = rest > 0 ? el("p", { class: "hint", text: `${rest} more rows` }) : null;
  return el("div", { class: "table-frame", tabindex: "0" }, table, more);
}
