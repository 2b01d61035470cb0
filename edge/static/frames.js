/**
 * What a client may send: checked before it is written, so that a mistake is an error in the
 * program that made it and not an `error` frame later. The rules are the edge's own, checked by
 * `protos/testdata/frames.json`. Sizes are not checked here: the limit comes with `ready`.
 */

export const OVERLAPS = Object.freeze(["queue", "reject", "interrupt", "steer", "latest", "parallel"]);

const MAX_ID_CHARACTERS = 128;
const MAX_DEPTH = 64;
// Controls, line and paragraph separators, halves of surrogate pairs.
const UNPRINTABLE = /[\p{Cc}\p{Cs}\p{Zl}\p{Zp}]/u;

/** @returns {string|null} what is wrong with a frame of a client, or null */
export function findFault(frame) {
  if (!isObject(frame)) return "a frame is a JSON object";
  if ("user_id" in frame) return "identity comes from the token alone";
  const check = CHECKS.get(frame.type);
  if (check === undefined) return `unknown type ${JSON.stringify(frame.type)}`;
  return check(frame) ?? (depth(frame, 0) > MAX_DEPTH ? "nested too deeply" : null);
}

const CHECKS = new Map([
  ["user_message", messageFault],
  ["cancel", cancelFault],
  ["user_input", (frame) => idFault(frame, "request_id") ?? (frame.value === undefined ? "value is missing" : null)],
  ["ack", ackFault],
  ["auth", (frame) => (typeof frame.token === "string" && frame.token ? null : "token is a string")],
  ["ping", (frame) => (typeof frame.t === "number" && Number.isFinite(frame.t) ? null : "t is a number")],
]);

function messageFault(frame) {
  const { content, overlap, agent } = frame;
  const parts = Array.isArray(content) && content.every(isObject);
  if (typeof content !== "string" && !parts) return "content is a string or a list of objects";
  if (overlap !== undefined && !OVERLAPS.includes(overlap)) return "overlap is not known";
  if (agent !== undefined && typeof agent !== "string") return "agent is a string";
  return idFault(frame, "id") ?? (frame.thread_id === undefined ? null : idFault(frame, "thread_id"));
}

function cancelFault(frame) {
  if (frame.run_id === undefined && frame.thread_id === undefined) return "run_id or thread_id is needed";
  return (
    (frame.run_id === undefined ? null : idFault(frame, "run_id")) ??
    (frame.thread_id === undefined ? null : idFault(frame, "thread_id"))
  );
}

function ackFault({ sequence, digest }) {
  if (!Number.isSafeInteger(sequence) || sequence < 0) return "sequence is a number from 0";
  return digest === undefined || typeof digest === "string" ? null : "digest is a string";
}

function idFault(frame, name) {
  const id = frame[name];
  const length = typeof id === "string" ? [...id].length : 0;
  if (length < 1 || length > MAX_ID_CHARACTERS || UNPRINTABLE.test(id)) {
    return `${name} is 1 to ${MAX_ID_CHARACTERS} printable characters`;
  }
  return null;
}

function depth(value, level) {
  if (level > MAX_DEPTH || value === null || typeof value !== "object") return level;
  return Math.max(level, ...Object.values(value).map((inner) => depth(inner, level + 1)));
}

function isObject(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value);
}
