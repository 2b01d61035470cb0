/** The message field: grows with its text, sends with Enter, stops the active run. */

import { byId } from "./dom.js";

const MAX_HEIGHT_PX = 220;

export class Composer {
  /** @param {{onSend: (text: string) => void, onStop: () => void}} actions */
  constructor({ onSend, onStop }) {
    this.form = byId("composer");
    this.text = byId("composer-text");
    this.sendButton = byId("send");
    this.stopButton = byId("stop");
    this.note = byId("composer-note");
    this.enabled = true;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = this.text.value.trim();
      if (!text || !this.enabled) return;
      this.text.value = "";
      this.#grow();
      this.setNote("");
      onSend(text);
    });
    this.text.addEventListener("input", () => this.#grow());
    this.text.addEventListener("keydown", (event) => {
      // An Enter that ends the composition of a character belongs to the input method.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    this.stopButton.addEventListener("click", onStop);
  }

  focus() {
    // On touch screens focus would open the keyboard over the conversation.
    if (!matchMedia("(pointer: coarse)").matches) this.text.focus({ preventScroll: true });
  }

  setEnabled(enabled) {
    this.enabled = enabled;
    this.text.disabled = !enabled;
    this.#grow();
  }

  setRunning(running) {
    this.stopButton.hidden = !running;
  }

  setNote(text) {
    this.note.textContent = text;
  }

  /** Put a text back that could not be sent, unless something new was typed meanwhile. */
  restore(text) {
    if (!this.text.value) this.text.value = text;
    this.#grow();
  }

  #grow() {
    this.sendButton.disabled = !this.enabled || !this.text.value.trim();
    this.text.style.height = "auto";
    this.text.style.height = `${Math.min(this.text.scrollHeight, MAX_HEIGHT_PX)}px`;
  }
}
