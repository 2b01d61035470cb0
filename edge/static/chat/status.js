/**
 * What the connection does, in words: the pill at the top and the inspector at the foot.
 * Counts down while it waits to resume; a click on the pill tries at once.
 */

import { byId, el, setText } from "./dom.js";

const REASONS = {
  TOKEN_EXPIRED: "the token expired",
  TOKEN_INVALID: "the token is not valid",
  TOKEN_REVOKED: "the token was revoked",
  PERMISSION_DENIED: "permission denied",
  PROTOCOL_VIOLATION: "protocol violation",
  USER_EVICTED: "an operator ended the session",
  CONNECTION_REPLACED: "this session went on elsewhere",
  MESSAGE_TOO_LARGE: "a message was too large",
  NOT_FOUND: "nothing answers at this address",
};

export class Status {
  #details = { state: "CONNECTING", retryAt: null, reason: null };
  #fields = new Map();

  /** @param {{onRetry: () => void}} actions */
  constructor({ onRetry }) {
    this.pill = byId("status");
    this.text = byId("status-text");
    this.line = byId("inspector-line");
    this.list = byId("inspector-list");
    this.pill.addEventListener("click", () => {
      if (this.#details.retryAt !== null) onRetry();
      else byId("inspector").open = !byId("inspector").open;
    });
    setInterval(() => this.#draw(), 250);
  }

  /** @param {{state: string, reason?: string|null, retryAt?: number|null}} details `retryAt` in Unix ms */
  set({ state, reason = null, retryAt = null }) {
    this.#details = { state, reason, retryAt };
    this.#draw();
  }

  /** Facts for the inspector, as `{name: text}`; an empty text removes one. */
  inspect(facts) {
    for (const [name, text] of Object.entries(facts)) {
      const value = String(text ?? "");
      const shown = this.#fields.get(name);
      if (shown === value) continue;
      if (value) this.#fields.set(name, value);
      else this.#fields.delete(name);
    }
    this.#drawInspector();
  }

  #draw() {
    const { state, reason, retryAt } = this.#details;
    const left = retryAt === null ? 0 : Math.max(0, Math.ceil((retryAt - Date.now()) / 1_000));
    const words = {
      CONNECTING: left ? `Connecting in ${left} s` : "Connecting",
      OPEN: "Live",
      RESUMING: left ? `Resuming in ${left} s` : "Resuming",
      CLOSED: `Closed: ${REASONS[reason] ?? reason ?? "ended"}`,
    };
    this.pill.dataset.state = state.toLowerCase();
    this.pill.title = left ? "Try now" : "Connection details";
    setText(this.text, words[state]);
  }

  #drawInspector() {
    const field = (name) => this.#fields.get(name);
    const line = [
      ["node", field("node")],
      ["epoch", field("epoch")],
      ["sequence", field("sequence")],
      ["connection", field("connection")],
    ].filter(([, value]) => value);
    const parts = line.map(([name, value]) =>
      el("span", { class: "fact", data: { name } }, el("span", { class: "fact-name", text: name }), value),
    );
    this.line.replaceChildren(...parts);
    if (!parts.length) this.line.textContent = "not connected";
    const rows = [...this.#fields].map(([name, value]) =>
      el("div", {}, el("dt", { text: name }), el("dd", { text: value })),
    );
    this.list.replaceChildren(...rows);
  }
}
