/**
 * The chat page: puts sign-in, session, history and views together. Holds no rule of its own.
 *
 * One `Client` lives as long as its token; after a new sign-in another one goes on from its
 * position. Messages that no server accepted yet are sent again by whichever client is next.
 */

import { byId } from "./chat/dom.js";
import { Composer } from "./chat/composer.js";
import { Conversation } from "./chat/conversation.js";
import { History } from "./chat/history.js";
import { SignIn } from "./chat/sign_in.js";
import { Status } from "./chat/status.js";
import { answerTexts, contentText, ThreadModel } from "./chat/thread_model.js";
import { MAIN_THREAD, Threads } from "./chat/threads.js";
import { Client, newId, StewardError } from "./steward.js";
import { StreamRules } from "./stream_rules.js";

const EXAMPLES = [
  "Which region sold the most?",
  "Show the sales of each region",
  "What is 12.5% of 8640?",
  "How many days until 2027-01-01?",
];
const SIGN_IN_AGAIN = new Map([
  ["TOKEN_EXPIRED", "Your session expired. Sign in again to go on."],
  ["TOKEN_INVALID", "This token is not valid here. Sign in again."],
  ["TOKEN_REVOKED", "This token was revoked. Sign in again."],
]);
const SAID = {
  CONNECTING: "Connecting",
  OPEN: "Connected",
  RESUMING: "Connection lost, resuming",
  CLOSED: "The session is closed",
};
const PING_EVERY_MS = 15_000;

class App {
  #client = null;
  #model = new ThreadModel(MAIN_THREAD);
  #history = null;
  #rules = new StreamRules();
  #connections = 0;
  #said = null;
  #signIn = new SignIn();

  constructor() {
    this.status = new Status({ onRetry: () => this.#client?.retry() });
    this.conversation = new Conversation(
      {
        onAnswer: (requestId, value) => this.#client.answer(requestId, value),
        onExample: (text) => this.#send(text),
        onEarlier: () => this.#loadEarlier(),
      },
      EXAMPLES,
    );
    this.threads = new Threads({ onSelect: (threadId) => this.#openThread(threadId) });
    this.composer = new Composer({ onSend: (text) => this.#send(text), onStop: () => this.#stop() });
    byId("new-thread").addEventListener("click", () => this.#openThread(newId()));
    byId("sign-out").addEventListener("click", () => this.#signOut());
    byId("menu").addEventListener("click", () => this.#showSidebar(true));
    byId("backdrop").addEventListener("click", () => this.#showSidebar(false));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#showSidebar(false);
    });
    addEventListener("hashchange", () => {
      if (threadOfAddress() !== this.#model.threadId) this.#openThread(threadOfAddress());
    });
    setInterval(() => this.#measure(), PING_EVERY_MS);
  }

  /** Sign in, then run one client after the other; never returns. */
  async run() {
    let explain = "";
    let token = null;
    try {
      token = await this.#signIn.silently();
    } catch (error) {
      explain = error.message;
    }
    let position = null;
    for (;;) {
      token ??= await this.#signIn.ask(explain);
      byId("app").hidden = false;
      const { reason, reached } = await this.#session(token, position);
      position = reached;
      explain = SIGN_IN_AGAIN.get(reason);
      if (explain === undefined) {
        this.composer.setEnabled(false);
        this.composer.setNote("This session is over. Reload the page to begin a new one.");
        return;
      }
      this.#signIn.forget();
      token = null;
    }
  }

  /** Run a client until it ends. */
  #session(token, position) {
    const isFirst = this.#client === null;
    const client = new Client({ token, position, merge: true });
    this.#client = client;
    if (isFirst) this.#openThread(threadOfAddress(), { load: false });
    client.addEventListener("opened", ({ detail }) => this.#onOpened(client, detail));
    client.addEventListener("event", ({ detail }) => this.#onEvent(detail));
    client.addEventListener("state", ({ detail }) => this.#onState(detail));
    client.addEventListener("problem", ({ detail }) => this.composer.setNote(detail.message ?? detail.reason));
    return new Promise((resolve) => {
      client.addEventListener("ended", ({ detail }) => {
        resolve({ reason: detail.reason, reached: client.position });
      });
      client.start();
      for (const { id, content, refused } of this.#model.pending.values()) {
        if (refused === null) this.#deliver(id, content, this.#model.threadId);
      }
    });
  }

  #onOpened(client, { resume, ready }) {
    this.#connections += 1;
    byId("account-name").textContent = ready.user_id;
    this.status.inspect({
      node: ready.manager.node_id,
      epoch: ready.manager.epoch,
      sequence: client.position.sequence,
      connection: ready.connection_id,
      user: `${ready.tenant_id} / ${ready.user_id}`,
      stream: ready.stream_id,
      resume,
      connections: this.#connections,
      "token until": new Date(ready.token_expires_at).toLocaleString([], { dateStyle: "short", timeStyle: "short" }),
      heartbeat: `${ready.limits.heartbeat_seconds} s`,
    });
    this.#measure();
    if (resume === "resumed" && this.#history?.isLoaded) return;
    if (resume === "reset") this.#model = new ThreadModel(this.#model.threadId);
    this.#rules = new StreamRules();
    this.threads.clear();
    this.threads.select(this.#model.threadId);
    this.#loadThreads();
    this.#loadHistory();
  }

  #onEvent(event) {
    const text = event.type === "user_message" ? contentText(event.data.content) : "";
    this.threads.see(event, text);
    this.#model.merge([event]);
    this.#rules.see(event);
    const facts = { sequence: event.sequence, epoch: event.epoch, "stream rules": this.#verdict() };
    if (event.type === "manager_moved") facts.node = event.data.to_node;
    this.status.inspect(facts);
    if (event.thread_id === this.#model.threadId) {
      if (event.type === "user_message") this.#showTitle();
      if (event.type === "agent_completed") this.#announce(event);
    }
    this.#draw();
  }

  #onState({ state, reason, retryAt }) {
    // Said once per change: the countdown on the pill is for eyes only.
    if (state !== this.#said) this.#say(SAID[state]);
    this.#said = state;
    this.status.set({ state, reason, retryAt });
    if (state !== "OPEN") this.status.inspect({ "last break": reason });
  }

  // -- threads and history ----------------------------------------------------------------------

  #openThread(threadId, { load = true } = {}) {
    this.#showSidebar(false);
    this.#model = new ThreadModel(threadId);
    this.#history = null;
    this.threads.select(threadId);
    history.replaceState(null, "", threadId === MAIN_THREAD ? location.pathname : `#thread=${encodeURIComponent(threadId)}`);
    this.conversation.show(this.#model);
    this.#showTitle();
    this.composer.setNote("");
    this.#draw();
    this.composer.focus();
    if (load) this.#loadHistory();
  }

  async #loadThreads() {
    try {
      const { threads } = await this.#client.threads();
      this.threads.load(threads);
      this.#showTitle();
    } catch (error) {
      this.#explain("The list of threads could not be read", error);
    }
  }

  async #loadHistory() {
    const model = this.#model;
    const past = new History(() => this.#client, model);
    this.#history = past;
    this.conversation.show(model);
    this.conversation.setLoading(true);
    try {
      await past.load();
    } catch (error) {
      if (past === this.#history) this.#explain("Earlier messages could not be read", error);
    }
    if (past !== this.#history) return;
    if (past.firstEvent?.type === "user_message") {
      this.threads.name(model.threadId, contentText(past.firstEvent.data.content));
      this.#showTitle();
    }
    this.conversation.setLoading(false);
    this.conversation.setEarlier(past.hasEarlier);
    this.#draw();
  }

  async #loadEarlier() {
    const past = this.#history;
    try {
      await past.earlier();
    } catch (error) {
      this.#explain("Earlier messages could not be read", error);
    }
    return past === this.#history && past.hasEarlier;
  }

  // -- what the person does -----------------------------------------------------------------------

  #send(text) {
    const id = newId();
    this.#model.addPending(id, text);
    this.conversation.follow();
    this.#draw();
    this.#deliver(id, text, this.#model.threadId);
  }

  async #deliver(id, content, threadId) {
    try {
      await this.#client.send(content, { id, threadId });
    } catch (error) {
      if (SIGN_IN_AGAIN.has(error.reason)) return;
      this.#model.refusePending(id, refusalText(error));
      this.#draw();
    }
  }

  #stop() {
    for (const run of this.#model.activeRuns) this.#client.cancel({ runId: run.runId });
  }

  #signOut() {
    this.#signIn.forget();
    this.#client?.close();
    location.assign(location.pathname);
  }

  // -- small things -----------------------------------------------------------------------------------

  #draw() {
    this.composer.setRunning(this.#model.activeRuns.length > 0);
    this.conversation.draw();
  }

  #showTitle() {
    const title = this.threads.title(this.#model.threadId);
    byId("thread-title").textContent = title;
    document.title = title === "Main thread" ? "Steward" : `${title} – Steward`;
  }

  #showSidebar(shown) {
    document.body.classList.toggle("sidebar-open", shown);
    const menu = byId("menu");
    const was = menu.getAttribute("aria-expanded") === "true";
    menu.setAttribute("aria-expanded", String(shown));
    if (shown) byId("new-thread").focus();
    else if (was) menu.focus();
  }

  #announce(event) {
    const run = this.#model.items.find((item) => item.runId === event.run_id);
    const answer = run ? answerTexts(run).map((text) => text.text).join(" ") : "";
    this.#say(answer || `The run ended: ${event.data.outcome}`);
  }

  /** For screen readers. */
  #say(text) {
    byId("announcer").textContent = text;
  }

  async #measure() {
    if (this.#client === null || document.hidden) return;
    const ms = await this.#client.ping();
    this.status.inspect({ "round trip": ms === null ? "" : `${ms.toFixed(1)} ms` });
  }

  /** The order rules of the stream, checked on all that this page saw live. */
  #verdict() {
    const { findings, count } = this.#rules;
    if (findings.length === 0) return `kept by ${count} live ${count === 1 ? "event" : "events"}`;
    const { kind, sequence } = findings[0];
    return `broken: ${kind} at ${sequence}`;
  }

  #explain(what, error) {
    this.composer.setNote(`${what}: ${error.message}.`);
  }
}

function refusalText(error) {
  if (!(error instanceof StewardError)) return error.message;
  const wait = error.retryAfterMs ? ` Try again in ${Math.ceil(error.retryAfterMs / 1_000)} s.` : "";
  return `Not sent: ${error.message}.${wait}`;
}

function threadOfAddress() {
  return new URLSearchParams(location.hash.slice(1)).get("thread") || MAIN_THREAD;
}

await new App().run();
