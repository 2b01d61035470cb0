/** The list of threads: newest first, with a mark where something runs or is new. */

import { byId, el } from "./dom.js";

export const MAIN_THREAD = "main";

const MAX_TITLE = 80;

export class Threads {
  #threads = new Map();
  #current = MAIN_THREAD;

  /** @param {{onSelect: (threadId: string) => void}} actions */
  constructor({ onSelect }) {
    this.list = byId("threads");
    this.onSelect = onSelect;
  }

  /** What the server knows: `[{thread_id, title, sequence, updated_at}]`. */
  load(threads) {
    for (const { thread_id: id, title, sequence } of threads) {
      const known = this.#thread(id);
      known.title = title || known.title;
      known.sequence = Math.max(known.sequence, sequence);
    }
    this.#draw();
  }

  clear() {
    this.#threads.clear();
    this.#draw();
  }

  select(threadId) {
    this.#current = threadId;
    this.#thread(threadId).unread = false;
    this.#draw();
  }

  title(threadId) {
    return this.#threads.get(threadId)?.title || (threadId === MAIN_THREAD ? "Main thread" : "New thread");
  }

  /** Name a thread by its first message, where the server gave it no title. */
  name(threadId, text) {
    const thread = this.#thread(threadId);
    thread.title ||= text.slice(0, MAX_TITLE);
    this.#draw();
  }

  /** Take notice of a live event; `text` is that of a `user_message`. */
  see(event, text = "") {
    if (!event.thread_id) return;
    const thread = this.#thread(event.thread_id);
    thread.sequence = event.sequence;
    const before = `${thread.running}|${thread.unread}|${thread.title}`;
    if (event.type === "user_message" && !thread.title) thread.title = text.slice(0, MAX_TITLE);
    if (event.type === "agent_started") thread.running = true;
    if (event.type === "agent_completed") {
      thread.running = false;
      thread.unread = event.thread_id !== this.#current;
    }
    const isNewest = this.list.firstElementChild?.dataset.thread === event.thread_id;
    if (!isNewest || before !== `${thread.running}|${thread.unread}|${thread.title}`) this.#draw();
  }

  #thread(id) {
    let thread = this.#threads.get(id);
    if (thread === undefined) {
      thread = { id, title: "", sequence: 0, running: false, unread: false };
      this.#threads.set(id, thread);
    }
    return thread;
  }

  #draw() {
    const newestFirst = [...this.#threads.values()].sort((a, b) => {
      // A thread without events yet was just made: it comes first.
      return (b.sequence || Infinity) - (a.sequence || Infinity) || (a.id < b.id ? -1 : 1);
    });
    this.list.replaceChildren(
      ...newestFirst.map((thread) => {
        const isCurrent = thread.id === this.#current;
        const state = thread.running ? "running" : thread.unread ? "unread" : "";
        return el(
          "li",
          { data: { thread: thread.id } },
          el(
            "button",
            {
              type: "button",
              class: "thread",
              "aria-current": isCurrent ? "page" : null,
              data: { state },
              on: { click: () => this.onSelect(thread.id) },
            },
            el("span", { class: "thread-name", text: this.title(thread.id) }),
            state ? el("span", { class: "thread-mark", title: state, "aria-label": state, role: "img" }) : null,
          ),
        );
      }),
    );
  }
}
