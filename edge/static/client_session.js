/**
 * The client's side of one session across all its connections: a pure state machine.
 *
 * `handle(nowMs, command, random)` takes what happened and returns what to do; `nextDeadline()`
 * says when it wants a `tick`. It holds no socket, reads no clock and draws no random numbers.
 * Commands and effects are those of `protos/testdata/README.md`; the Python SDK has the same
 * machine, and `protos/testdata/client_session.json` checks both.
 *
 * It guarantees that events are delivered in order of `sequence`, each once, over any number of
 * connections; that a gap or a falling epoch is never passed on but forces a resume; and that
 * a message stays pending, and is written again under its id, until it is accepted or failed.
 * It stores nothing: a new machine knows only the position it is given.
 */

export const State = Object.freeze({
  CONNECTING: "CONNECTING",
  OPEN: "OPEN",
  RESUMING: "RESUMING",
  CLOSED: "CLOSED",
});

const DIAL_MS = 30_000;
const BACKOFF_FIRST_MS = 250;
const BACKOFF_MAX_MS = 30_000;
const BACKOFF_RESET_MS = 10_000;
// The least time between two acknowledgements of sampled events.
const ACK_EVERY_MS = 50;
const SAMPLED = /^.{54}[13579bdf]$/;
const REFRESH_AHEAD_MS = 60_000;
const CLOSE_NORMAL = 1000;
const CLOSE_TO_RESUME = 3000;

const REASON_OF_CLOSE = new Map([
  [1009, "MESSAGE_TOO_LARGE"],
  [1011, "INTERNAL"],
  [4001, "TOKEN_EXPIRED"],
  [4002, "EDGE_DRAINING"],
  [4003, "NO_CAPACITY"],
  [4004, "SLOW_CONSUMER"],
  [4005, "RATE_LIMITED"],
  [4006, "MANAGER_UNAVAILABLE"],
  [4007, "HEARTBEAT_TIMEOUT"],
  [4008, "CONNECTION_AGED"],
  [4500, "TOKEN_INVALID"],
  [4501, "PERMISSION_DENIED"],
  [4502, "PROTOCOL_VIOLATION"],
  [4503, "USER_EVICTED"],
  [4504, "CONNECTION_REPLACED"],
]);
const KNOWN_REASONS = new Set([...REASON_OF_CLOSE.values(), "TOKEN_REVOKED", "NOT_FOUND"]);
const REASON_OF_STATUS = new Map([
  [401, "TOKEN_INVALID"],
  [403, "PERMISSION_DENIED"],
  [404, "NOT_FOUND"],
  [429, "RATE_LIMITED"],
  [503, "NO_CAPACITY"],
]);

/** The reason of a close: what its text names, else what its code means; null when neither says. */
export function reasonOfClose(code, text = "") {
  if (KNOWN_REASONS.has(text)) return text;
  return REASON_OF_CLOSE.get(code) ?? (isFinalClose(code) ? "PERMISSION_DENIED" : null);
}

/** True when the range of a close code says: do not connect again. */
export function isFinalClose(code) {
  return code === 1009 || (code >= 4500 && code <= 4999);
}

export class ClientSession {
  #state = State.CONNECTING;
  #renewable;
  #maxPending;

  #streamId;
  #sequence;
  #takesAnyNext = false;
  #epoch = 0;

  /** A socket exists: being dialled, or open. */
  #connected = false;
  #everOpen = false;
  #openedAt = null;
  #newToken = false;
  #failures = 0;
  #toldUntil = null;
  #lostReason = null;
  #endReason = null;

  #heartbeatMs = 0;
  #maxMessageBytes = Infinity;
  #started = false;
  #pending = new Map();
  #posts = [];

  #dialAt = null;
  #readyBy = null;
  #aliveUntil = null;
  #leaveAt = null;
  #refreshAt = null;
  #ackAt = null;
  #ackedAt = -ACK_EVERY_MS;

  /**
   * @param {{after?: number|null, stream?: string|null, renewable?: boolean, max_pending?: number}} [config]
   *   `after` and `stream`: resume from there; without, begin with what happens from now on.
   *   `renewable`: new tokens can be had
   */
  constructor({ after = null, stream = null, renewable = true, max_pending = 64 } = {}) {
    this.#sequence = after;
    this.#streamId = stream;
    this.#renewable = renewable;
    this.#maxPending = max_pending;
  }

  get state() {
    return this.#state;
  }

  /** `{stream_id, sequence}` of the last event delivered; null before there is one. */
  get position() {
    if (this.#sequence === null) return null;
    return { stream_id: this.#streamId, sequence: this.#sequence };
  }

  /** Ids of messages neither accepted nor failed, in the order of sending. */
  get pending() {
    return [...this.#pending.keys()];
  }

  /** When the next connection is tried, in ms of the driver's clock; null when it does not wait. */
  get dialAt() {
    return this.#dialAt;
  }

  /** Why the last connection was lost, or why the session ended; null when unknown. */
  get reason() {
    return this.#endReason ?? this.#lostReason;
  }

  /** When the machine wants a `tick`, in ms of the driver's clock; null means never. */
  nextDeadline() {
    const times = [
      this.#dialAt,
      this.#readyBy,
      this.#aliveUntil,
      this.#leaveAt,
      this.#refreshAt,
      this.#ackAt,
    ];
    const set = times.filter((time) => time !== null);
    return set.length ? Math.min(...set) : null;
  }

  /**
   * @param {number} nowMs Unix ms, never going back
   * @param {{type: string}} command start, received, closed, refused, send, post, ack, token, tick,
   *   close; and `retry`, which ends a wait for the next connection
   * @param {number} random in [0, 1), for the wait that this command may start
   * @returns {{type: string}[]} effects in order: open, shut, write, opened, deliver, accepted, failed,
   *   problem, refresh_token, ended
   */
  handle(nowMs, command, random = 0) {
    if (this.#state === State.CLOSED) {
      return command.type === "send" ? [failed(command.frame.id, this.#endReason)] : [];
    }
    switch (command.type) {
      case "start":
        return this.#onStart(nowMs);
      case "received":
        return this.#onReceived(nowMs, command.frame, random);
      case "closed":
        return this.#onClosed(nowMs, command, random);
      case "refused":
        return this.#onRefused(nowMs, command, random);
      case "send":
        return this.#onSend(command.frame, command.size ?? 0);
      case "post":
        return this.#onPost(command.frame);
      case "ack":
        return this.#isOpen() ? [write({ type: "ack", sequence: command.sequence })] : [];
      case "token":
        return this.#isOpen() ? [write({ type: "auth", token: command.token })] : [];
      case "tick":
        return this.#onTick(nowMs, random);
      case "retry":
        return this.#dialAt === null ? [] : this.#dial(nowMs);
      case "close":
        return this.#end(null, this.#connected);
      default:
        throw new TypeError(`unknown command ${command.type}`);
    }
  }

  // -- connections ----------------------------------------------------------------------------

  #isOpen() {
    return this.#state === State.OPEN;
  }

  #onStart(nowMs) {
    if (this.#started) return [];
    this.#started = true;
    return this.#dial(nowMs);
  }

  #dial(nowMs) {
    this.#dialAt = null;
    this.#connected = true;
    this.#readyBy = nowMs + DIAL_MS;
    const effect = { type: "open", new_token: this.#newToken };
    if (this.#sequence !== null) {
      effect.after = this.#sequence;
      if (this.#streamId !== null) effect.stream = this.#streamId;
    }
    return [effect];
  }

  #onClosed(nowMs, { code, reason: text = "" }, random) {
    if (!this.#connected) return [];
    const reason = reasonOfClose(code, text);
    if (isFinalClose(code)) return this.#end(reason);
    if (code === 4001) {
      if (!this.#renewable) return this.#end(reason);
      this.#newToken = true;
    }
    return this.#lose(nowMs, reason, random);
  }

  #onRefused(nowMs, { status, reason: named, retry_after_ms: toldMs = 0 }, random) {
    if (!this.#connected || this.#isOpen()) return [];
    const reason = named ?? REASON_OF_STATUS.get(status) ?? null;
    if (status === 401) {
      if (!this.#renewable || this.#newToken) return this.#end(reason);
      this.#newToken = true;
    } else if (status >= 400 && status < 500 && status !== 429) {
      return this.#end(reason ?? "PROTOCOL_VIOLATION");
    }
    if (toldMs > 0) this.#toldUntil = nowMs + toldMs;
    return this.#lose(nowMs, reason, random);
  }

  /** The connection is gone: wait, exactly as announced or else with full jitter. */
  #lose(nowMs, reason, random) {
    if (this.#openedAt !== null && nowMs - this.#openedAt >= BACKOFF_RESET_MS) this.#failures = 0;
    if (this.#leaveAt !== null) {
      this.#dialAt = Math.max(nowMs, this.#leaveAt);
    } else {
      const ceiling = Math.min(BACKOFF_MAX_MS, BACKOFF_FIRST_MS * 2 ** Math.min(this.#failures, 20));
      const told = this.#toldUntil === null ? 0 : Math.max(0, this.#toldUntil - nowMs);
      this.#dialAt = nowMs + told + Math.floor(random * ceiling);
      this.#failures += 1;
    }
    this.#detach();
    this.#toldUntil = null;
    this.#lostReason = reason;
    this.#state = this.#everOpen ? State.RESUMING : State.CONNECTING;
    return [];
  }

  /** Give the connection up: what came on it can't be trusted, or nothing comes any more. */
  #breakOff(nowMs, reason, random) {
    return [{ type: "shut", code: CLOSE_TO_RESUME }, ...this.#lose(nowMs, reason, random)];
  }

  #detach() {
    this.#connected = false;
    this.#openedAt = null;
    this.#readyBy = null;
    this.#aliveUntil = null;
    this.#leaveAt = null;
    this.#refreshAt = null;
    this.#ackAt = null;
  }

  #end(reason, shuts = false) {
    this.#detach();
    this.#dialAt = null;
    this.#state = State.CLOSED;
    this.#endReason = reason;
    const lost = this.pending.map((id) => failed(id, reason));
    this.#pending.clear();
    this.#posts = [];
    const shut = shuts ? [{ type: "shut", code: CLOSE_NORMAL }] : [];
    return [...shut, ...lost, { type: "ended", reason }];
  }

  // -- frames ---------------------------------------------------------------------------------

  #onReceived(nowMs, frame, random) {
    if (!this.#connected) return [];
    if (!isObject(frame) || typeof frame.type !== "string") {
      return this.#breakOff(nowMs, "BAD_FRAME", random);
    }
    if (!this.#isOpen()) {
      if (frame.type !== "ready") return this.#breakOff(nowMs, "BAD_FRAME", random);
      return this.#onReady(nowMs, frame, random);
    }
    this.#aliveUntil = nowMs + 2 * this.#heartbeatMs;
    switch (frame.type) {
      case "ready":
        return this.#breakOff(nowMs, "BAD_FRAME", random);
      case "accepted":
        return this.#pending.delete(frame.id) ? [{ ...frame }] : [];
      case "error":
        return this.#onError(nowMs, frame);
      case "going_away":
        this.#leaveAt = nowMs + frame.reconnect_after_ms;
        return [];
      case "heartbeat":
        return frame.sequence > this.#sequence ? this.#breakOff(nowMs, "GAP", random) : [];
      case "authenticated":
        this.#planRefresh(nowMs, frame.token_expires_at);
        return [];
      case "pong":
        return [];
      default:
        return this.#onEvent(nowMs, frame, random);
    }
  }

  #onReady(nowMs, frame, random) {
    const asked = this.#sequence !== null;
    if (asked ? frame.resume === "new" : frame.resume === "resumed") {
      return this.#breakOff(nowMs, "BAD_FRAME", random);
    }
    const isOther = this.#streamId !== null && this.#streamId !== frame.stream_id;
    const resume = frame.resume === "resumed" && isOther ? "reset" : frame.resume;
    if (resume === "new") this.#sequence = frame.sequence;
    if (resume === "reset") {
      this.#sequence = 0;
      this.#epoch = 0;
    }
    this.#takesAnyNext = resume === "reset";
    this.#streamId = frame.stream_id;
    this.#state = State.OPEN;
    this.#everOpen = true;
    this.#openedAt = nowMs;
    this.#newToken = false;
    this.#toldUntil = null;
    this.#readyBy = null;
    this.#heartbeatMs = frame.limits.heartbeat_seconds * 1_000;
    this.#maxMessageBytes = frame.limits.max_message_bytes;
    this.#aliveUntil = nowMs + 2 * this.#heartbeatMs;
    this.#planRefresh(nowMs, frame.token_expires_at);
    const opened = {
      type: "opened",
      resume,
      stream_id: frame.stream_id,
      sequence: frame.sequence,
      ready: frame,
    };
    const messages = [...this.#pending].map(([id, { frame: message, size }]) => {
      if (size <= this.#maxMessageBytes) return write(message);
      this.#pending.delete(id);
      return failed(id, "MESSAGE_TOO_LARGE");
    });
    return [opened, ...messages, ...this.#posts.splice(0).map(write)];
  }

  #onError(nowMs, frame) {
    const { reason, message, ref, retry_after_ms: toldMs } = frame;
    const detail = toldMs === undefined ? { message } : { message, retry_after_ms: toldMs };
    if (ref !== undefined && this.#pending.delete(ref)) return [failed(ref, reason, detail)];
    if (reason === "RATE_LIMITED" && ref === undefined && toldMs > 0) this.#toldUntil = nowMs + toldMs;
    return [{ type: "problem", reason, ...detail }];
  }

  #onEvent(nowMs, frame, random) {
    if (frame.sequence === undefined && frame.stream_id === undefined) return [];
    const { sequence, epoch, stream_id: streamId } = frame;
    // Of a merged event the first that it stands for.
    const first = frame.from_sequence === undefined ? sequence : frame.from_sequence;
    const isCounted = Number.isSafeInteger(sequence) && Number.isSafeInteger(first);
    if (!isCounted || first < 0 || streamId !== this.#streamId) {
      return this.#breakOff(nowMs, "BAD_FRAME", random);
    }
    if (sequence <= this.#sequence) return [];
    // Also when it stands for some that were delivered: their text would come twice.
    if (first > sequence || (first !== this.#sequence + 1 && !this.#takesAnyNext)) {
      return this.#breakOff(nowMs, "GAP", random);
    }
    if (!Number.isSafeInteger(epoch) || epoch < this.#epoch) {
      return this.#breakOff(nowMs, "EPOCH_WENT_DOWN", random);
    }
    this.#sequence = sequence;
    this.#epoch = epoch;
    this.#takesAnyNext = false;
    const deliver = { type: "deliver", sequence, event: frame };
    // So that a trace that is kept ends where the user is.
    return SAMPLED.test(frame.trace) ? [deliver, ...this.#acknowledge(nowMs)] : [deliver];
  }

  // -- messages, tokens, time -------------------------------------------------------------------

  #onSend(frame, size) {
    if (this.#pending.has(frame.id)) return [];
    if (this.#pending.size >= this.#maxPending) return [failed(frame.id, "QUEUE_FULL")];
    if (this.#isOpen() && size > this.#maxMessageBytes) return [failed(frame.id, "MESSAGE_TOO_LARGE")];
    this.#pending.set(frame.id, { frame, size });
    return this.#isOpen() ? [write(frame)] : [];
  }

  #onPost(frame) {
    if (this.#isOpen()) return [write(frame)];
    if (this.#posts.length >= this.#maxPending) return [{ type: "problem", reason: "QUEUE_FULL" }];
    this.#posts.push(frame);
    return [];
  }

  #acknowledge(nowMs) {
    const dueAt = this.#ackedAt + ACK_EVERY_MS;
    this.#ackAt = nowMs < dueAt ? dueAt : null;
    if (this.#ackAt !== null) return [];
    this.#ackedAt = nowMs;
    return [write({ type: "ack", sequence: this.#sequence })];
  }

  #planRefresh(nowMs, expiresAt) {
    const expiresMs = Date.parse(expiresAt);
    this.#refreshAt = null;
    if (!this.#renewable || !Number.isFinite(expiresMs)) return;
    const remaining = Math.max(0, expiresMs - nowMs);
    this.#refreshAt = expiresMs - Math.floor(Math.min(REFRESH_AHEAD_MS, remaining / 4));
  }

  #onTick(nowMs, random) {
    const isDue = (time) => time !== null && time <= nowMs;
    if (isDue(this.#dialAt)) return this.#dial(nowMs);
    if (isDue(this.#leaveAt)) return this.#breakOff(nowMs, "GOING_AWAY", random);
    if (isDue(this.#readyBy)) return this.#breakOff(nowMs, "NO_READY", random);
    if (isDue(this.#aliveUntil)) return this.#breakOff(nowMs, "HEARTBEAT_TIMEOUT", random);
    if (isDue(this.#refreshAt)) {
      this.#refreshAt = null;
      return [{ type: "refresh_token" }];
    }
    if (isDue(this.#ackAt)) return this.#acknowledge(nowMs);
    return [];
  }
}

function isObject(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value);
}

function write(frame) {
  return { type: "write", frame };
}

function failed(id, reason, detail = {}) {
  return { type: "failed", id, reason, ...detail };
}
