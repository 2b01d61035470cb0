/**
 * Older events of a thread, page by page, over what the HTTP interface offers: the newest page,
 * and pages that ascend from a position. Live events are registered before the first page is read,
 * so that what happens in between is in one of the two; the model drops what is in both.
 */

const PAGE = 500;
const FIRST_WINDOW = 500;
/** The newest page may begin inside a run: read on until its beginning, at most this often. */
const MAX_COMPLETIONS = 4;

export class History {
  #client;
  #model;
  /** Sequence of the thread's first event; null until it is known. */
  #first = null;

  /** The newest page was read. */
  isLoaded = false;

  /** @param {() => import("../steward.js").Client} client the one that is signed in now */
  constructor(client, model) {
    this.#client = client;
    this.#model = model;
  }

  /** True when the thread has events before the oldest one held. */
  get hasEarlier() {
    return this.#first !== null && this.#model.oldest > this.#first;
  }

  /** The thread's first event, once `load` has read it; null for an empty thread. */
  firstEvent = null;

  /** The newest page, and as much before it as its first run needs. */
  async load() {
    const newest = await this.#page({ limit: PAGE });
    this.#model.merge(newest.events);
    this.isLoaded = true;
    if (newest.events.length === 0) return;
    const start = await this.#page({ after: 0, limit: 1 });
    this.firstEvent = start.events[0] ?? null;
    this.#first = this.firstEvent?.sequence ?? this.#model.oldest;
    for (let i = 0; i < MAX_COMPLETIONS && this.#model.isCutOff && this.hasEarlier; i += 1) {
      await this.earlier();
    }
  }

  /** At least one event before the oldest one held, when there is any. */
  async earlier() {
    const until = this.#model.oldest;
    let window = FIRST_WINDOW;
    while (this.hasEarlier && this.#model.oldest === until) {
      let after = Math.max(this.#first - 1, until - 1 - window);
      const found = [];
      // A page may be cut by size: go on until it reaches what is held.
      for (;;) {
        const page = await this.#page({ after, limit: PAGE });
        found.push(...page.events);
        const last = page.events.at(-1)?.sequence ?? until;
        if (last >= until - 1 || page.next === undefined) break;
        after = last;
      }
      this.#model.merge(found);
      window *= 4;
    }
  }

  #page(query) {
    return this.#client().threadEvents(this.#model.threadId, query);
  }
}
