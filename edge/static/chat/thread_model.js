/**
 * What a thread looks like, made from its events: a pure reducer without DOM, clock or network.
 *
 * A thread is a list of items in stream order: runs (a question, the steps of the agent, the
 * answer) and notices (`manager_moved`). The same events give the same thread in whatever
 * pieces they came: live events are applied one by one, a page of history that arrives later is
 * merged by sequence and the thread is made anew. It never invents an event: what the stream
 * does not say is absent.
 *
 * Runs carry a `revision` that grows with each change, so that a view redraws only what changed.
 */

/** Events that belong to no thread but are shown in each of them. */
const NOTICES = new Set(["manager_moved"]);

export class ThreadModel {
  /** @param {string} threadId */
  constructor(threadId) {
    this.threadId = threadId;
    /** @type {object[]} events of this thread, ascending by sequence, each once */
    this.events = [];
    this.pending = new Map();
    this.#restart();
  }

  /** The first sequence held, 0 when there is none. */
  get oldest() {
    return this.events.length ? firstOf(this.events[0]) : 0;
  }

  /** Runs that have begun or wait and are not over yet, oldest first. */
  get activeRuns() {
    return this.items.filter((item) => item.kind === "run" && item.status !== "done");
  }

  /** True when the first run held lacks its beginning: an earlier page has it. */
  get isCutOff() {
    const first = this.items.find((item) => item.kind === "run");
    return first !== undefined && first.message === null && first.parentRunId === null;
  }

  /**
   * Merge events, in any order and with repeats; what lies inside of a merged event (one with
   * `from_sequence`) is a repeat too. Returns true when older events came in between, that is
   * when every item was made anew.
   * @param {object[]} events
   */
  merge(events) {
    const fresh = events
      .filter((event) => event.thread_id === this.threadId || NOTICES.has(event.type))
      .sort((a, b) => a.sequence - b.sequence);
    const last = this.events.length ? this.events[this.events.length - 1].sequence : 0;
    if (fresh.every((event, index) => firstOf(event) > (index ? fresh[index - 1].sequence : last))) {
      for (const event of fresh) this.#append(event);
      return false;
    }
    const all = withoutRepeats([...this.events, ...fresh]);
    if (all.length === this.events.length && all.every((event, index) => isEqual(event, this.events[index]))) {
      return false;
    }
    this.events = [];
    this.#restart();
    for (const event of all) this.#append(event);
    return true;
  }

  /** Show a message that was sent and is not in the stream yet. */
  addPending(id, content) {
    if (!this.#messageIds.has(id)) this.pending.set(id, { id, content, refused: null });
  }

  /** The server refused a message: it stays visible with the reason. */
  refusePending(id, message) {
    const pending = this.pending.get(id);
    if (pending) pending.refused = message;
  }

  #messageIds = new Set();
  #runs = new Map();

  #restart() {
    /** @type {object[]} */
    this.items = [];
    this.#runs = new Map();
    this.#messageIds = new Set();
  }

  #append(event) {
    this.events.push(event);
    if (NOTICES.has(event.type)) {
      this.items.push({ kind: "notice", key: `notice-${event.sequence}`, event });
      return;
    }
    if (!event.run_id) return;
    const run = this.#run(event);
    if (event.type === "user_message") {
      this.#messageIds.add(event.data.id);
      this.pending.delete(event.data.id);
    }
    applyToRun(run, event);
  }

  #run(event) {
    let run = this.#runs.get(event.run_id);
    if (run === undefined) {
      run = newRun(event);
      this.#runs.set(event.run_id, run);
      this.items.push(run);
    }
    return run;
  }
}

/** The first sequence that an event stands for: its own, unless it is merged. */
function firstOf(event) {
  return event.from_sequence ?? event.sequence;
}

function isEqual(a, b) {
  return a.sequence === b.sequence && firstOf(a) === firstOf(b);
}

/**
 * Events in order, each part of the stream once: a merged one stands for those that it was made of.
 * Two merged ones never overlap, since a session goes on behind the last that it has.
 */
function withoutRepeats(events) {
  const sorted = [...events].sort((a, b) => a.sequence - b.sequence || firstOf(b) - firstOf(a));
  const kept = [];
  for (const event of sorted) {
    while (kept.length && kept[kept.length - 1].sequence >= firstOf(event)) kept.pop();
    kept.push(event);
  }
  return kept;
}

function newRun(event) {
  return {
    kind: "run",
    key: `run-${event.run_id}`,
    runId: event.run_id,
    parentRunId: event.parent_run_id ?? null,
    revision: 0,
    status: "queued",
    message: null,
    agent: event.agent ?? "",
    startedAt: null,
    entries: [],
    texts: [],
    questions: [],
    progress: null,
    outcome: null,
    durationMs: null,
    response: null,
    result: undefined,
    error: null,
  };
}

/** Entries of the timeline: one per step that a person would tell apart. */
function applyToRun(run, event) {
  const data = event.data ?? {};
  run.revision += 1;
  if (event.agent) run.agent = event.agent;
  switch (event.type) {
    case "user_message":
      run.message = { id: data.id, content: data.content, time: event.time };
      return;
    case "agent_started":
      run.status = "running";
      run.startedAt = event.time;
      addEntry(run, event, { kind: "started", agent: run.agent, attempt: data.attempt ?? 1 });
      return;
    case "agent_thinking":
      addThought(run, event, data);
      return;
    case "tool_executing":
      addEntry(run, event, {
        kind: "tool_executing",
        callId: data.tool_call_id,
        tool: data.tool_name,
        arguments: data.arguments,
        purpose: data.purpose ?? "",
        open: true,
      });
      return;
    case "tool_completed":
      for (const entry of run.entries) {
        if (entry.kind === "tool_executing" && entry.callId === data.tool_call_id) entry.open = false;
      }
      addEntry(run, event, {
        kind: "tool_completed",
        callId: data.tool_call_id,
        tool: data.tool_name,
        success: data.success,
        result: data.result,
        error: data.error ?? null,
        durationMs: data.duration_ms,
      });
      return;
    case "agent_text":
      addText(run, data);
      return;
    case "input_requested":
      run.questions.push({
        requestId: data.request_id,
        prompt: data.prompt,
        schema: data.schema ?? {},
        answered: false,
        value: undefined,
      });
      return;
    case "input_received":
      for (const question of run.questions) {
        if (question.requestId === data.request_id) {
          question.answered = true;
          question.value = data.value;
        }
      }
      return;
    case "progress":
      run.progress = { fraction: data.fraction, label: data.label ?? "" };
      return;
    case "custom":
      addEntry(run, event, { kind: "custom", name: data.name, value: data.value });
      return;
    case "agent_completed":
      run.status = "done";
      run.progress = null;
      run.outcome = data.outcome;
      run.durationMs = data.duration_ms;
      run.response = data.response ?? null;
      run.result = data.result;
      run.error = data.error ?? null;
      for (const entry of run.entries) entry.open = false;
      addEntry(run, event, {
        kind: "completed",
        outcome: data.outcome,
        durationMs: data.duration_ms,
        error: run.error,
      });
      return;
    default:
  }
}

function addEntry(run, event, fields) {
  run.entries.push({ sequence: event.sequence, time: event.time, open: false, ...fields });
}

function addThought(run, event, data) {
  const last = run.entries[run.entries.length - 1];
  if (data.delta && last?.kind === "thinking" && last.delta) {
    last.thought += data.thought;
    return;
  }
  addEntry(run, event, {
    kind: "thinking",
    thought: data.thought,
    delta: data.delta === true,
    step: data.step ?? null,
    totalSteps: data.total_steps ?? null,
  });
}

function addText(run, data) {
  const known = run.texts.find((text) => text.messageId === data.message_id);
  if (known) known.text += data.delta;
  else run.texts.push({ messageId: data.message_id, text: data.delta });
}

/** Text of a message's content: a string, or a list of parts of which the text ones are joined. */
export function contentText(content) {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return "";
  return content
    .map((part) => (typeof part === "string" ? part : (part?.text ?? "")))
    .filter(Boolean)
    .join("\n");
}

/**
 * The texts to show as the answer: what was streamed, then the final response unless
 * it only repeats what was streamed.
 * @returns {{key: string, text: string}[]}
 */
export function answerTexts(run) {
  const shown = run.texts.map((text) => ({ key: text.messageId, text: text.text }));
  const response = (run.response ?? "").trim();
  if (!response) return shown;
  const streamed = shown.map((text) => text.text).join("");
  const last = shown.length ? shown[shown.length - 1].text.trim() : "";
  if (streamed.trim() === response || last === response) return shown;
  if (response.startsWith(streamed.trim()) && shown.length) {
    // The run died before all was streamed, or streamed a part only: the response is the whole.
    return [{ key: shown[0].key, text: response }];
  }
  return [...shown, { key: "response", text: response }];
}
