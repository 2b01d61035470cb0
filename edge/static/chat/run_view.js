/**
 * One run on the page: the question, the steps as a timeline, and the answer.
 *
 * Redraws only what changed: entries of a timeline are added and never replaced, except the one
 * that still grows. A disclosure that a person opened stays open.
 */

import { el, setText } from "./dom.js";
import { updateMarkdown } from "./markdown.js";
import { answerTexts, contentText } from "./thread_model.js";
import { formatDuration, valueNode, wholeNode } from "./values.js";

/** Where the steps stand above the answer and would push it away. */
const NARROW = "(max-width: 48rem)";

const OUTCOMES = {
  success: "Completed",
  failed: "Failed",
  cancelled: "Cancelled",
  interrupted: "Interrupted",
};

export class RunView {
  #revision = -1;
  #entries = [];
  #texts = new Map();
  #questions = new Map();
  #steps;
  #list;
  #summary;
  #question;
  #answer;
  #foot;
  #progress;
  #result = null;

  /** @param {{onAnswer: (requestId: string, value: unknown) => void}} actions */
  constructor(run, actions) {
    this.actions = actions;
    this.#question = el("div", { class: "question" });
    this.#summary = el("summary", { class: "steps-summary" });
    this.#list = el("ol", { class: "timeline", "aria-label": "Steps" });
    this.#steps = el("details", { class: "steps", open: true }, this.#summary, this.#list);
    this.#progress = el("div", { class: "progress", hidden: true });
    this.#answer = el("div", { class: "answer" });
    this.#foot = el("p", { class: "run-foot", hidden: true });
    this.element = el(
      "article",
      { class: "run", data: { run: run.runId }, "aria-label": "Question and answer" },
      this.#question,
      el("div", { class: "work" }, this.#steps),
      el("div", { class: "reply" }, this.#answer, this.#progress, this.#foot),
    );
    this.update(run);
  }

  /** Older runs fold their steps when a newer one begins. */
  fold() {
    this.#steps.open = false;
  }

  update(run) {
    if (run.revision === this.#revision) return;
    this.#revision = run.revision;
    const ends = run.status === "done" && this.element.dataset.status !== "done";
    if (ends && matchMedia(NARROW).matches) this.fold();
    this.element.dataset.status = run.status;
    this.element.dataset.outcome = run.outcome ?? "";
    this.#drawQuestion(run);
    this.#drawTimeline(run);
    this.#drawAnswer(run);
    this.#drawQuestions(run);
    this.#drawProgress(run);
    this.#drawFoot(run);
  }

  #drawQuestion(run) {
    if (run.message === null || this.#question.childNodes.length) return;
    this.#question.append(el("p", { class: "bubble", text: contentText(run.message.content) }));
  }

  #drawTimeline(run) {
    const shown = this.#entries;
    run.entries.forEach((entry, index) => {
      if (index === shown.length) {
        const node = el("li", { class: "entry" });
        this.#list.append(node);
        shown.push({ node, drawn: "" });
      }
      const state = `${isActive(entry, run)}|${entry.thought?.length ?? 0}`;
      if (shown[index].drawn !== state) {
        drawEntry(shown[index].node, entry, run);
        shown[index].drawn = state;
      }
    });
    const tools = run.entries.filter((entry) => entry.kind === "tool_executing").length;
    const parts = [run.entries.length === 1 ? "1 step" : `${run.entries.length} steps`];
    if (tools) parts.push(tools === 1 ? "1 tool" : `${tools} tools`);
    if (run.durationMs !== null) parts.push(formatDuration(run.durationMs));
    setText(this.#summary, run.status === "queued" ? "Waiting for its turn" : parts.join(" · "));
    this.#steps.hidden = run.entries.length === 0 && run.status !== "queued";
  }

  #drawAnswer(run) {
    const texts = answerTexts(run);
    const keys = new Set(texts.map((text) => text.key));
    for (const [key, node] of this.#texts) {
      if (!keys.has(key)) {
        node.remove();
        this.#texts.delete(key);
      }
    }
    for (const { key, text } of texts) {
      let node = this.#texts.get(key);
      if (node === undefined) {
        node = el("div", { class: "prose", data: { message: key } });
        this.#texts.set(key, node);
        this.#answer.append(node);
      }
      updateMarkdown(node, text);
    }
    if (run.result !== undefined && this.#result === null) {
      this.#result = el("div", { class: "result" }, wholeNode(run.result));
      this.#answer.append(this.#result);
    }
    const asks = run.questions.some((question) => !question.answered);
    const isSilent = texts.length === 0 && run.progress === null && !asks;
    this.#answer.classList.toggle("waiting", run.status === "running" && isSilent);
    this.#answer.setAttribute("aria-busy", String(run.status === "running"));
  }

  #drawQuestions(run) {
    for (const question of run.questions) {
      const shown = this.#questions.get(question.requestId);
      const open = !question.answered && run.status === "running";
      if (shown?.open === open) continue;
      const node = open
        ? questionForm(question, this.actions)
        : answeredQuestion(question);
      if (shown) shown.node.replaceWith(node);
      else this.#answer.append(node);
      this.#questions.set(question.requestId, { node, open });
    }
  }

  #drawProgress(run) {
    const progress = run.progress;
    this.#progress.hidden = progress === null;
    if (progress === null) return;
    if (!this.#progress.childNodes.length) {
      this.#progress.append(el("progress", { max: "1" }), el("span", {}));
    }
    const [bar, label] = this.#progress.childNodes;
    bar.value = progress.fraction;
    bar.setAttribute("aria-label", progress.label || "Progress");
    setText(label, [progress.label, `${Math.round(progress.fraction * 100)} %`].filter(Boolean).join(" · "));
  }

  #drawFoot(run) {
    const failed = run.outcome !== null && run.outcome !== "success";
    this.#foot.hidden = !failed;
    if (!failed) return;
    const reason = run.error ? `${run.error.type}: ${run.error.message}` : "";
    setText(this.#foot, [OUTCOMES[run.outcome] ?? run.outcome, reason].filter(Boolean).join(". "));
  }
}

function drawEntry(node, entry, run) {
  node.dataset.kind = entry.kind;
  node.dataset.sequence = String(entry.sequence);
  node.classList.toggle("open", isActive(entry, run));
  node.replaceChildren(
    el("span", { class: "entry-mark", "aria-hidden": "true" }),
    el("div", { class: "entry-body" }, ...entryBody(entry, node)),
    el("span", { class: "entry-sequence", text: String(entry.sequence), title: `sequence ${entry.sequence}` }),
  );
}

/** Still going on: a tool without its result, or the thought that is the newest step. */
function isActive(entry, run) {
  const thinks = entry.kind === "thinking" && run.status === "running" && run.entries.at(-1) === entry;
  return entry.open || thinks;
}

function entryBody(entry, node) {
  switch (entry.kind) {
    case "started":
      return [title("Started", [entry.agent, entry.attempt > 1 ? `attempt ${entry.attempt}` : ""])];
    case "thinking": {
      const step = entry.step && entry.totalSteps ? `${entry.step} of ${entry.totalSteps}` : "";
      return [title("Thinking", [step]), el("p", { class: "thought", text: entry.thought })];
    }
    case "tool_executing":
      return [
        title("Calls", [], entry.tool),
        entry.purpose ? el("p", { class: "thought", text: entry.purpose }) : null,
        valueNode(entry.arguments, "Arguments"),
      ];
    case "tool_completed": {
      node.dataset.success = String(entry.success);
      const value = entry.success
        ? valueNode(entry.result, "Result")
        : el("p", { class: "thought bad", text: entry.error ? `${entry.error.type}: ${entry.error.message}` : "" });
      return [title(entry.success ? "Returned" : "Failed", [formatDuration(entry.durationMs)], entry.tool), value];
    }
    case "completed":
      node.dataset.outcome = entry.outcome;
      return [title(OUTCOMES[entry.outcome] ?? entry.outcome, [formatDuration(entry.durationMs)])];
    default:
      return [title("Custom", [], entry.name), valueNode(entry.value, "Value")];
  }
}

function title(verb, details, code = "") {
  const rest = details.filter(Boolean).join(" · ");
  return el(
    "p",
    { class: "entry-title" },
    el("span", { class: "entry-verb", text: verb }),
    code ? el("code", { text: code }) : null,
    rest ? el("span", { class: "entry-detail", text: rest }) : null,
  );
}

function questionForm(question, actions) {
  const answer = (value) => actions.onAnswer(question.requestId, value);
  const prompt = el("p", { class: "ask-prompt", text: question.prompt });
  if (question.schema.type === "boolean") {
    const button = (label, value, kind) =>
      el("button", { class: `button ${kind}`, type: "button", text: label, on: { click: () => answer(value) } });
    return el("div", { class: "ask" }, prompt, el("div", { class: "ask-row" }, button("Yes", true, "primary"), button("No", false, "")));
  }
  const isNumber = question.schema.type === "number" || question.schema.type === "integer";
  const field = el("input", { type: isNumber ? "number" : "text", step: isNumber ? "any" : null, required: true, "aria-label": question.prompt });
  const submit = (event) => {
    event.preventDefault();
    answer(isNumber ? Number(field.value) : field.value);
  };
  const row = el("div", { class: "ask-row" }, field, el("button", { class: "button primary", type: "submit", text: "Answer" }));
  return el("form", { class: "ask", on: { submit } }, prompt, row);
}

function answeredQuestion(question) {
  const value = question.value === true ? "Yes" : question.value === false ? "No" : JSON.stringify(question.value);
  return el(
    "div",
    { class: "ask answered" },
    el("p", { class: "ask-prompt", text: question.prompt }),
    el("p", { class: "ask-value", text: question.answered ? (value ?? "") : "Not answered" }),
  );
}
