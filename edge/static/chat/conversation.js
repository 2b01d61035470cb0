/**
 * The conversation: items of a thread in order, messages on their way, and where the reader is.
 *
 * Draws at most once per frame, however many events arrive. Follows the newest line as long as
 * the reader is at the end, and never moves the page under somebody who scrolled up.
 */

import { byId, el } from "./dom.js";
import { RunView } from "./run_view.js";
import { contentText } from "./thread_model.js";
import { formatDuration } from "./values.js";

const NEAR_END_PX = 80;
/** A timer and not an animation frame: tabs in the background keep up too. */
const FRAME_MS = 16;

export class Conversation {
  #model = null;
  #views = new Map();
  #scheduled = false;
  #following = true;
  #loading = false;
  #newestRun = null;
  #pendingShown = "[]";

  /**
   * @param {{onAnswer: (requestId: string, value: unknown) => void, onExample: (text: string) => void,
   *   onEarlier: () => Promise<boolean>}} actions `onEarlier` loads a page and says whether there is more
   * @param {string[]} examples
   */
  constructor(actions, examples) {
    this.actions = actions;
    this.scroll = byId("scroll");
    this.items = byId("items");
    this.pending = byId("pending");
    this.empty = byId("empty");
    this.latest = byId("latest");
    this.earlier = byId("earlier");
    byId("examples").append(
      ...examples.map((text) =>
        el("li", {}, el("button", { type: "button", text, on: { click: () => actions.onExample(text) } })),
      ),
    );
    this.scroll.addEventListener("scroll", () => this.#onScroll(), { passive: true });
    this.latest.addEventListener("click", () => this.follow());
    this.earlier.addEventListener("click", () => this.#loadEarlier());
    new ResizeObserver(() => this.#keepEnd()).observe(byId("conversation"));
    new ResizeObserver(() => this.#keepEnd()).observe(this.scroll);
  }

  /** Show another thread. */
  show(model) {
    this.#model = model;
    this.#views.clear();
    this.items.replaceChildren();
    this.pending.replaceChildren();
    this.#pendingShown = "[]";
    this.#newestRun = null;
    this.#following = true;
    this.setEarlier(false);
    this.draw();
  }

  setLoading(loading) {
    this.#loading = loading;
    byId("loading").hidden = !loading;
    this.draw();
  }

  /** Whether a button for earlier messages is offered. */
  setEarlier(available) {
    this.earlier.hidden = !available;
  }

  /** Go to the end and stay there. */
  follow() {
    this.#following = true;
    this.#keepEnd();
  }

  /** Draw soon; what comes until then is drawn with it. */
  draw() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    setTimeout(() => {
      this.#scheduled = false;
      this.#draw();
    }, FRAME_MS);
  }

  #draw() {
    const model = this.#model;
    if (model === null) return;
    this.empty.hidden = this.#loading || model.items.length > 0 || model.pending.size > 0;
    let before = this.items.firstElementChild;
    const keep = new Set();
    for (const item of model.items) {
      const view = this.#view(item);
      keep.add(item.key);
      if (item.kind === "run") view.update(item);
      if (view.element === before) before = before.nextElementSibling;
      else this.items.insertBefore(view.element, before);
    }
    for (const [key, view] of this.#views) {
      if (!keep.has(key)) {
        view.element.remove();
        this.#views.delete(key);
      }
    }
    this.#foldOlder(model);
    this.#drawPending(model);
    this.#keepEnd();
  }

  #view(item) {
    let view = this.#views.get(item.key);
    if (view === undefined || (item.kind === "run" && view.run !== item)) {
      view?.element.remove();
      view = item.kind === "run" ? new RunView(item, this.actions) : { element: noticeNode(item.event) };
      view.run = item;
      this.#views.set(item.key, view);
    }
    return view;
  }

  #foldOlder(model) {
    const runs = model.items.filter((item) => item.kind === "run");
    const newest = runs.at(-1)?.key ?? null;
    if (newest === this.#newestRun) return;
    this.#newestRun = newest;
    for (const run of runs.slice(0, -1)) {
      if (run.status === "done") this.#views.get(run.key).fold();
    }
  }

  #drawPending(model) {
    const shown = JSON.stringify([...model.pending.values()]);
    if (shown === this.#pendingShown) return;
    this.#pendingShown = shown;
    this.pending.replaceChildren(
      ...[...model.pending.values()].map((message) =>
        el(
          "div",
          { class: "question", data: { pending: message.refused ? "refused" : "sending" } },
          el("p", { class: "bubble", text: contentText(message.content) }),
          el("p", { class: "bubble-note", text: message.refused ?? "Sending" }),
        ),
      ),
    );
  }

  async #loadEarlier() {
    this.earlier.disabled = true;
    const height = this.scroll.scrollHeight;
    const top = this.scroll.scrollTop;
    this.#following = false;
    try {
      this.setEarlier(await this.actions.onEarlier());
      this.#draw();
      this.scroll.scrollTop = top + this.scroll.scrollHeight - height;
    } finally {
      this.earlier.disabled = false;
    }
  }

  #onScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroll;
    this.#following = scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
    this.latest.hidden = this.#following;
  }

  #keepEnd() {
    if (this.#following) this.scroll.scrollTop = this.scroll.scrollHeight;
    this.latest.hidden = this.#following;
  }
}

function noticeNode(event) {
  const { from_node: from, to_node: to, cause, gap_ms: gap } = event.data;
  const way = from && to ? `Moved from ${from} to ${to}` : `Now on ${to || "another node"}`;
  const why = cause ? ` (${cause.replaceAll("_", " ")})` : "";
  const text = `${way}${why}${gap > 0 ? `, away for ${formatDuration(gap)}` : ""}`;
  return el("p", { class: "notice", data: { sequence: String(event.sequence) } }, el("span", { text }));
}
