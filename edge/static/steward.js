/**
 * The JavaScript client of Steward, for browsers and Node.
 *
 *     import { Client } from "/static/steward.js";
 *     const client = new Client({ token }).start();
 *     const run = await client.ask("Which region sold the most?");
 *     for await (const event of run) console.log(event.type, event.data);
 *
 * A `Client` is one session over any number of connections. It resumes by position, sends
 * messages again under the same id until they are accepted, and delivers each event once and in
 * order; those rules are in `client_session.js`, and this module is the shell around it:
 * sockets, timers, tokens and promises. It keeps nothing across a reload: give it the
 * `position` that you stored. See `edge/web/README.md`.
 */

import { ClientSession, State } from "./client_session.js";
import { findFault } from "./frames.js";

export { State };

const SUBPROTOCOL = "steward.v1";
const MAX_TIMER_MS = 2 ** 31 - 1;
const MAX_WAITING_EVENTS = 10_000;
const HTTP_DEADLINE_MS = 15_000;

/** A refusal: `reason` is for programs (see the table of the wire protocol), `message` for people. */
export class StewardError extends Error {
  constructor(reason, message = "", retryAfterMs = undefined) {
    super(message || String(reason));
    this.name = "StewardError";
    this.reason = reason;
    this.retryAfterMs = retryAfterMs;
  }
}

/** A new id for a message, a thread or a client: 22 characters of 128 random bits. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/**
 * Events (`addEventListener`), each with `detail`: `event` (one of the stream), `opened` (`resume`,
 * `ready`; after `"reset"` drop what you have), `state` (`state`, `reason`, `retryAt`), `problem`
 * (an `error` frame about nothing that was sent), `ended` (`reason`).
 */
export class Client extends EventTarget {
  #url;
  #urls;
  #dials = 0;
  #provider;
  #token = null;
  #asking = null;
  #auth;
  #clientId;
  #merge;
  #WebSocket;
  #fetch;

  #session;
  #generation = 0;
  #socket = null;
  #abort = null;
  #timer = null;
  #lastNow = 0;
  #ready = null;

  #sends = new Map();
  #iterators = new Set();
  #pings = new Map();
  #trace;
  #wake = () => this.retry();

  /**
   * @param {object} options
   * @param {string | string[]} [options.url] base address of an edge; default: where the page came from.
   *   Several, where no balancer stands before the edges: each dial after the first goes to the next one
   * @param {string | ((why: "start"|"refresh"|"refused") => Promise<string>)} options.token a token, or
   *   where to get one: the first, a new one before the last expires, or one instead of a refused one
   * @param {{stream_id: string, sequence: number}} [options.position] resume after it; default: what
   *   happens from now on
   * @param {string} [options.clientId] id of this tab or device; a second connection with it takes over
   * @param {"ticket"|"subprotocol"} [options.auth] how the socket is authenticated: by a one-use ticket
   *   (refusals can be told apart), or by the token as a subprotocol (one round trip less)
   * @param {() => string | undefined} [options.trace] the `traceparent` of what a message is sent for,
   *   asked for each; without one the edge begins a trace
   * @param {boolean} [options.merge] lets the server send neighbouring deltas of one text as one event,
   *   with `from_sequence`, while this client reads too slowly; `ready.merge` says whether it does
   * @param {typeof globalThis.WebSocket} [options.WebSocket] for Node before 22
   * @param {typeof globalThis.fetch} [options.fetch]
   */
  constructor({
    url = globalThis.location?.origin,
    token,
    position = null,
    clientId = newId(),
    auth = "ticket",
    merge = false,
    trace = () => undefined,
    WebSocket = globalThis.WebSocket,
    fetch = globalThis.fetch,
  }) {
    super();
    if (!url?.length) throw new TypeError("url is needed outside of a browser");
    if (!token) throw new TypeError("token is needed");
    this.#urls = (typeof url === "string" ? [url] : url).map((one) => new URL(one));
    this.#url = this.#urls[0];
    this.#provider = typeof token === "function" ? token : null;
    this.#token = typeof token === "function" ? null : token;
    this.#auth = auth;
    this.#clientId = clientId;
    this.#merge = merge;
    this.#trace = trace;
    this.#WebSocket = WebSocket;
    this.#fetch = (...request) => fetch(...request);
    this.#session = new ClientSession({
      after: position?.sequence ?? null,
      stream: position?.stream_id ?? null,
      renewable: this.#provider !== null,
    });
  }

  get state() {
    return this.#session.state;
  }

  /** `{stream_id, sequence}` of the last event delivered: store it to resume after a reload. */
  get position() {
    return this.#session.position;
  }

  /** The `ready` frame of the last connection, or null. */
  get ready() {
    return this.#ready;
  }

  /** Begin to connect. Safe to call twice. */
  start() {
    globalThis.addEventListener?.("online", this.#wake);
    this.#handle({ type: "start" });
    return this;
  }

  /** End the session: sends that were not accepted fail. Safe to call twice. */
  close() {
    this.#handle({ type: "close" });
  }

  /** Do not wait any longer for the next connection. */
  retry() {
    this.#handle({ type: "retry" });
  }

  /**
   * Send a message. Resolves when it is in the log; sent again by itself until then.
   * @param {string | object[]} content
   * @param {{id?: string, threadId?: string, agent?: string, overlap?: string, trace?: string}} [options] `id` is the
   *   idempotency key: the same id again is the same message
   * @returns {Promise<{id: string, run_id: string, sequence: number, duplicate: boolean, queue_position?: number}>}
   * @throws {StewardError} the message was refused, or the session ended
   */
  send(content, { id = newId(), threadId, agent, overlap, trace = this.#trace() } = {}) {
    const frame = { type: "user_message", id, content };
    if (threadId !== undefined) frame.thread_id = threadId;
    if (agent !== undefined) frame.agent = agent;
    if (overlap !== undefined) frame.overlap = overlap;
    if (trace) frame.trace = trace;
    check(frame);
    const waiting = this.#sends.get(id);
    if (waiting !== undefined) return waiting.promise;
    const send = deferred();
    this.#sends.set(id, send);
    const size = new TextEncoder().encode(JSON.stringify(frame)).length;
    this.#handle({ type: "send", frame, size });
    return send.promise;
  }

  /**
   * Send a message and follow its run: an async iterable of the run's events that ends with
   * `agent_completed`. Resolves when the message is accepted. Takes the options of `send`.
   * @returns {Promise<Run>}
   */
  async ask(content, options = {}) {
    const id = options.id ?? newId();
    const run = new Run(this, id, () => this.#iterators.delete(run));
    this.#iterators.add(run);
    try {
      run.accept(await this.send(content, { ...options, id }));
    } catch (error) {
      this.#iterators.delete(run);
      throw error;
    }
    return run;
  }

  /** All events from now on, in order. A reader that falls 10,000 behind gets a StewardError. */
  events() {
    const queue = new EventQueue(() => this.#iterators.delete(queue));
    this.#iterators.add(queue);
    if (this.state === State.CLOSED) queue.end(null);
    return queue;
  }

  /** Stop a run, or all runs of a thread. Its `agent_completed` says when it is over. */
  cancel({ runId, threadId }) {
    const frame = { type: "cancel" };
    if (runId !== undefined) frame.run_id = runId;
    if (threadId !== undefined) frame.thread_id = threadId;
    this.#post(frame);
  }

  /** Answer an `input_requested`. */
  answer(requestId, value) {
    this.#post({ type: "user_input", request_id: requestId, value });
  }

  /** Tell the server that all events up to `sequence` were processed (optional, cumulative). */
  ack(sequence, digest = undefined) {
    check(digest === undefined ? { type: "ack", sequence } : { type: "ack", sequence, digest });
    this.#handle({ type: "ack", sequence });
  }

  /** Round trip to the edge in ms, or null when there is no connection. */
  async ping() {
    if (this.state !== State.OPEN) return null;
    const began = performance.now();
    const ping = deferred();
    this.#pings.set(began, ping);
    this.#post({ type: "ping", t: began });
    return ping.promise;
  }

  /** The user's threads, newest first: `{threads, next?}`. */
  threads({ next } = {}) {
    return this.#get("/v1/threads", { next });
  }

  /** A page of a thread's events, ascending: `{stream_id, events, next?}`. Without `after` the newest. */
  threadEvents(threadId, { after, limit } = {}) {
    return this.#get(`/v1/threads/${encodeURIComponent(threadId)}/events`, { after, limit });
  }

  // -- the shell around the machine -------------------------------------------------------------

  #handle(command) {
    this.#lastNow = Math.max(this.#lastNow, Date.now());
    const before = [this.#session.state, this.#session.dialAt];
    const effects = this.#session.handle(this.#lastNow, command, Math.random());
    for (const effect of effects) this.#perform(effect);
    if (before[0] !== this.#session.state || before[1] !== this.#session.dialAt) {
      const { state, reason, dialAt } = this.#session;
      this.#tell("state", { state, reason, retryAt: dialAt });
    }
    this.#setTimer();
  }

  #perform(effect) {
    switch (effect.type) {
      case "open":
        this.#abandon();
        this.#dial(effect, this.#generation);
        return;
      case "shut":
        this.#abandon(effect.code);
        return;
      case "write":
        this.#socket?.send(JSON.stringify(effect.frame));
        return;
      case "opened":
        this.#ready = effect.ready;
        this.#tell("opened", { resume: effect.resume, ready: effect.ready });
        return;
      case "deliver":
        for (const iterator of this.#iterators) iterator.offer(effect.event);
        this.#tell("event", effect.event);
        return;
      case "accepted": {
        const { type, ...accepted } = effect;
        this.#settle(effect.id)?.resolve(accepted);
        return;
      }
      case "failed":
        this.#settle(effect.id)?.reject(
          new StewardError(effect.reason ?? "CLOSED", effect.message, effect.retry_after_ms),
        );
        return;
      case "problem":
        this.#tell("problem", effect);
        return;
      case "refresh_token":
        this.#refreshToken();
        return;
      case "ended":
        this.#onEnded(effect.reason);
        return;
      default:
    }
  }

  #onEnded(reason) {
    this.#abandon();
    globalThis.removeEventListener?.("online", this.#wake);
    for (const iterator of this.#iterators) iterator.end(reason);
    this.#iterators.clear();
    this.#tell("ended", { reason });
  }

  #settle(id) {
    const send = this.#sends.get(id);
    this.#sends.delete(id);
    return send;
  }

  #post(frame) {
    check(frame);
    this.#handle({ type: "post", frame });
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #setTimer() {
    clearTimeout(this.#timer);
    const deadline = this.#session.nextDeadline();
    if (deadline === null) return;
    const delay = Math.min(Math.max(0, deadline - Date.now()), MAX_TIMER_MS);
    this.#timer = setTimeout(() => this.#handle({ type: "tick" }), delay);
  }

  /** Let go of the current socket or dial: nothing of it is heard again. */
  #abandon(code = 1000) {
    this.#generation += 1;
    this.#abort?.abort();
    this.#abort = null;
    const socket = this.#socket;
    this.#socket = null;
    if (socket !== null && socket.readyState < 2) socket.close(code);
    for (const ping of this.#pings.values()) ping.resolve(null);
    this.#pings.clear();
  }

  async #dial(effect, generation) {
    this.#abort = new AbortController();
    const refusal = await this.#prepare(effect, this.#abort.signal);
    if (generation !== this.#generation) return;
    if (refusal.type === "refused") {
      this.#handle(refusal);
      return;
    }
    const socket = new this.#WebSocket(refusal.address, refusal.protocols);
    this.#socket = socket;
    let upgraded = false;
    const current = (listener) => (event) => {
      if (generation === this.#generation) listener(event);
    };
    socket.addEventListener("open", () => (upgraded = true));
    socket.addEventListener("message", current(({ data }) => this.#onMessage(data)));
    socket.addEventListener(
      "close",
      current(({ code, reason }) => {
        this.#socket = null;
        // A browser does not tell why an upgrade was refused.
        this.#handle(upgraded ? { type: "closed", code, reason } : { type: "refused", status: 0 });
      }),
    );
    // Node's WebSocket throws for an error that nobody listens to; the close event follows.
    socket.addEventListener("error", () => undefined);
  }

  /** Address and subprotocols of the next dial, or the refusal met on the way. */
  async #prepare(effect, signal) {
    this.#url = this.#urls[this.#dials++ % this.#urls.length];
    const address = new URL("/v1/connect", this.#url);
    address.protocol = this.#url.protocol === "https:" ? "wss:" : "ws:";
    if (effect.after !== undefined) address.searchParams.set("after", effect.after);
    if (effect.stream !== undefined) address.searchParams.set("stream", effect.stream);
    address.searchParams.set("client", this.#clientId);
    if (this.#merge) address.searchParams.set("merge", "1");
    const protocols = [SUBPROTOCOL];
    try {
      const token = await this.#getToken(effect.new_token ? "refused" : "start");
      if (this.#auth === "ticket") {
        const response = await this.#request("/v1/tickets", { method: "POST", signal }, token);
        if (!response.ok) return await refusalOf(response);
        address.searchParams.set("ticket", (await response.json()).ticket);
      } else protocols.push(`steward.bearer.${token}`);
      return { type: "dial", address: address.href, protocols };
    } catch {
      // No token or no answer: the machine waits and comes back.
      return { type: "refused", status: 0 };
    }
  }

  #onMessage(data) {
    let frame = null;
    try {
      if (typeof data === "string") frame = JSON.parse(data);
    } catch {
      frame = null;
    }
    if (frame?.type === "pong") {
      this.#pings.get(frame.t)?.resolve(performance.now() - frame.t);
      this.#pings.delete(frame.t);
    }
    this.#handle({ type: "received", frame });
  }

  /** The token, or a new one; callers that come meanwhile share one question to the provider. */
  async #getToken(why) {
    if (this.#provider === null || (why === "start" && this.#token !== null)) return this.#token;
    this.#asking ??= Promise.resolve(this.#provider(why)).finally(() => (this.#asking = null));
    this.#token = await this.#asking;
    return this.#token;
  }

  async #refreshToken() {
    const before = this.#token;
    try {
      const token = await this.#getToken("refresh");
      if (token !== before) this.#handle({ type: "token", token });
    } catch {
      // The socket lives until the old token ends; then the machine asks again.
    }
  }

  async #get(path, parameters) {
    const query = new URLSearchParams();
    for (const [name, value] of Object.entries(parameters)) {
      if (value !== undefined) query.set(name, value);
    }
    const address = query.toString() ? `${path}?${query}` : path;
    let response = await this.#request(address, {}, await this.#getToken("start"));
    if (response.status === 401 && this.#provider !== null) {
      response = await this.#request(address, {}, await this.#getToken("refused"));
    }
    if (response.ok) return response.json();
    const { reason, message, retry_after_ms: retryAfterMs } = await refusalOf(response);
    throw new StewardError(reason ?? `HTTP_${response.status}`, message, retryAfterMs);
  }

  #request(path, options, token) {
    const timeout = AbortSignal.timeout(HTTP_DEADLINE_MS);
    const signal = options.signal ? AbortSignal.any([options.signal, timeout]) : timeout;
    const headers = { authorization: `Bearer ${token}`, accept: "application/json" };
    return this.#fetch(new URL(path, this.#url), { ...options, headers, signal });
  }
}

/** A bounded queue between the socket and one `for await`. */
class EventQueue {
  #events = [];
  #waiting = null;
  #ended = false;
  #error = null;
  #onDone;

  constructor(onDone) {
    this.#onDone = onDone;
  }

  offer(event) {
    if (this.#ended) return;
    if (this.#waiting !== null) {
      const { resolve } = this.#waiting;
      this.#waiting = null;
      resolve({ value: event, done: false });
    } else if (this.#events.length < MAX_WAITING_EVENTS) this.#events.push(event);
    else this.end("SLOW_CONSUMER");
  }

  /** No more events follow; with a reason the reader gets it as an error after the last one. */
  end(reason) {
    if (this.#ended) return;
    this.#ended = true;
    this.#error = reason === null ? null : new StewardError(reason);
    this.#onDone();
    const waiting = this.#waiting;
    this.#waiting = null;
    if (waiting === null) return;
    if (this.#error === null) waiting.resolve({ value: undefined, done: true });
    else waiting.reject(this.#error);
  }

  next() {
    if (this.#waiting !== null) return Promise.reject(new Error("one reader at a time"));
    if (this.#events.length) return Promise.resolve({ value: this.#events.shift(), done: false });
    if (this.#error !== null) return Promise.reject(this.#error);
    if (this.#ended) return Promise.resolve({ value: undefined, done: true });
    this.#waiting = deferred();
    return this.#waiting.promise;
  }

  return() {
    this.#events = [];
    this.end(null);
    return Promise.resolve({ value: undefined, done: true });
  }

  [Symbol.asyncIterator]() {
    return this;
  }
}

/** One run that was asked for: iterate over its events, once. */
export class Run {
  #client;
  #queue;
  #seen = null;

  constructor(client, messageId, onDone) {
    this.#client = client;
    this.#queue = new EventQueue(onDone);
    this.messageId = messageId;
    this.runId = null;
    /** The `accepted` answer. */
    this.accepted = null;
  }

  accept(accepted) {
    this.accepted = accepted;
    this.runId = accepted.run_id;
  }

  /** Stop it; its last event is `agent_completed`, outcome `cancelled`. */
  cancel() {
    this.#client.cancel({ runId: this.runId });
  }

  /** Read to the end and return the `agent_completed` event. */
  async completed() {
    let last = null;
    for await (const event of this) last = event;
    return last;
  }

  offer(event) {
    const isCause = event.type === "user_message" && event.data.id === this.messageId;
    // The event of the message may come before its `accepted`.
    if (isCause) this.runId = event.run_id;
    if (this.runId === null || event.run_id !== this.runId) return;
    // After a reset the stream is taken again from its start.
    if (this.#seen !== null && this.#seen.streamId === event.stream_id && event.sequence <= this.#seen.sequence) {
      return;
    }
    this.#seen = { streamId: event.stream_id, sequence: event.sequence };
    this.#queue.offer(event);
    if (event.type === "agent_completed") this.#queue.end(null);
  }

  end(reason) {
    this.#queue.end(reason ?? "CLOSED");
  }

  [Symbol.asyncIterator]() {
    return this.#queue;
  }
}

function check(frame) {
  const fault = findFault(frame);
  if (fault !== null) throw new TypeError(`${frame.type}: ${fault}`);
}

async function refusalOf(response) {
  const body = await response.json().catch(() => ({}));
  const header = Number(response.headers.get("retry-after"));
  const told = body.retry_after_ms ?? (Number.isFinite(header) ? header * 1_000 : 0);
  const refusal = { type: "refused", status: response.status, message: body.message, retry_after_ms: told };
  if (typeof body.reason === "string") refusal.reason = body.reason;
  return refusal;
}

function deferred() {
  const settle = {};
  settle.promise = new Promise((resolve, reject) => Object.assign(settle, { resolve, reject }));
  return settle;
}
