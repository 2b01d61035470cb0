/**
 * Does a stream of events keep what the protocol promises?
 *
 * Give `see` the events in the order in which they came; `findings` lists every break: of
 * positions and epochs, of the fields that each type must have, and of the order rules 1 to 4 of the
 * wire protocol. `protos/testdata/streams.json` checks it, and the Python checker beside it. What
 * it can't see it takes for good: of a stream that is joined in the middle it does not ask where
 * earlier runs began. It remembers one entry per run, for the life of a page.
 */

const isText = (value) => typeof value === "string";
const isName = (value) => isText(value) && value !== "";
const isFlag = (value) => typeof value === "boolean";
const isNumber = (value) => typeof value === "number";
const isCount = (value) => Number.isSafeInteger(value) && value >= 0;
const isOrdinal = (value) => Number.isSafeInteger(value) && value >= 1;
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isAnything = () => true;
const isContent = (value) => isText(value) || (Array.isArray(value) && value.every(isObject));
const isOutcome = (value) => ["success", "failed", "cancelled", "interrupted"].includes(value);
const isTime = (value) => isText(value) && /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/.test(value);
const isTrace = (value) =>
  isText(value) && /^00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$/.test(value);

/** Fields with a `?` may be absent. */
const ENVELOPE = {
  type: isName,
  stream_id: isName,
  sequence: isOrdinal,
  epoch: isOrdinal,
  event_id: isName,
  time: isTime,
  trace: isTrace,
  data: isObject,
  "thread_id?": isName,
  "run_id?": isName,
  "agent?": isName,
  "parent_run_id?": isName,
  "from_sequence?": isOrdinal,
};
const ERROR = { type: isName, message: isText };
const DATA = {
  agent_started: { input: isContent, attempt: isOrdinal },
  agent_thinking: {
    thought: isText,
    delta: isFlag,
    "step?": isCount,
    "total_steps?": isCount,
    "progress?": isNumber,
  },
  tool_executing: { tool_call_id: isName, tool_name: isName, arguments: isObject, "purpose?": isText },
  tool_completed: {
    tool_call_id: isName,
    tool_name: isName,
    success: isFlag,
    duration_ms: isCount,
    "error?": isObject,
  },
  agent_completed: {
    outcome: isOutcome,
    response: isText,
    duration_ms: isCount,
    "error?": isObject,
    "usage?": isObject,
  },
  agent_text: { message_id: isName, delta: isText },
  user_message: { id: isName, content: isContent },
  input_requested: { request_id: isName, prompt: isText, schema: isObject, "expires_at?": isTime },
  input_received: { request_id: isName, value: isAnything },
  state_snapshot: { state: isAnything },
  state_delta: { patch: Array.isArray },
  progress: { fraction: isNumber, label: isText },
  custom: { name: isName, value: isAnything },
  manager_moved: { from_node: isText, to_node: isText, cause: isText, gap_ms: isCount },
};
const OF_A_RUN = ["thread_id", "run_id"];
const BY_AN_AGENT = [...OF_A_RUN, "agent"];
const NEEDS = {
  agent_started: BY_AN_AGENT,
  agent_thinking: BY_AN_AGENT,
  tool_executing: BY_AN_AGENT,
  tool_completed: BY_AN_AGENT,
  agent_completed: BY_AN_AGENT,
  agent_text: BY_AN_AGENT,
  user_message: OF_A_RUN,
  input_requested: OF_A_RUN,
  input_received: OF_A_RUN,
  progress: OF_A_RUN,
};

export class StreamRules {
  /** @type {{kind: string, sequence: number, text: string}[]} */
  findings = [];
  /** Events seen. */
  count = 0;

  #interleaving;
  #last = null;
  #epoch = 0;
  #stream = null;
  #fromStart = true;
  #runs = new Map();
  /** Thread to the ids of its running runs, sub-agents left out. */
  #active = new Map();
  /** A start inside of another run, which is right if the next event cancels it. */
  #nested = null;

  /** @param {Iterable<string>} [interleaving] runs that were admitted under `parallel` or `steer` */
  constructor(interleaving = []) {
    this.#interleaving = new Set(interleaving);
  }

  /** Check the next event. */
  see(event) {
    this.count += 1;
    const at = event.sequence;
    if (!this.#checkPosition(event, at)) return;
    this.#checkFields(event, at);
    const data = isObject(event.data) ? event.data : {};
    this.#judgeNested(event, data);
    if (isText(event.type) && isText(event.run_id)) this.#checkOrder(event, at, data);
  }

  /** All findings; with `complete` a run that is still open is one too. */
  end({ complete = true } = {}) {
    for (const run of this.#runs.values()) {
      if (complete && !run.ended) this.#find("run_not_ended", run.first, "no agent_completed");
    }
    return this.findings;
  }

  #find(kind, sequence, text) {
    this.findings.push({ kind, sequence, text });
  }

  #checkPosition({ stream_id: stream, epoch, from_sequence: merged }, at) {
    const last = this.#last;
    if (isCount(at)) {
      // A merged event stands for those from `first` on.
      const first = isCount(merged) && merged <= at ? merged : at;
      this.#last = last === null ? at : Math.max(last, at);
      if (last === null) this.#fromStart = first <= 1;
      else if (first <= last) {
        this.#find("repeat", at, `${last} was seen already`);
        return false;
      } else if (first > last + 1) {
        this.#find("gap", at, `${last} was the one before`);
        this.#fromStart = false;
      }
    }
    if (isText(stream)) {
      this.#stream ??= stream;
      if (stream !== this.#stream) this.#find("stream_changed", at, `${stream}, after ${this.#stream}`);
    }
    if (isCount(epoch)) {
      if (epoch < this.#epoch) this.#find("epoch_down", at, `epoch ${epoch}, after ${this.#epoch}`);
      this.#epoch = Math.max(this.#epoch, epoch);
    }
    return true;
  }

  #checkFields(event, at) {
    this.#checkShape(event, ENVELOPE, at, "the event");
    const { type, data, from_sequence: first } = event;
    if (first !== undefined && isText(type)) {
      const isMerged = !(isOrdinal(first) && isOrdinal(at)) || first < at;
      if (type !== "agent_text" || !isMerged) this.#find("wrong_merge", at, `${type} from ${first}`);
    }
    for (const name of NEEDS[type] ?? []) {
      if (!(name in event)) this.#find("missing_field", at, `${type} has no ${name}`);
    }
    const shape = DATA[type];
    if (shape === undefined || !isObject(data)) return;
    this.#checkShape(data, shape, at, type);
    let wanted = null;
    if (type === "tool_completed" && isFlag(data.success)) wanted = data.success ? "result" : "error";
    if (type === "agent_completed" && data.outcome === "failed") wanted = "error";
    if (wanted !== null && !(wanted in data)) this.#find("missing_field", at, `${type} has no ${wanted}`);
    if ("error?" in shape && isObject(data.error)) this.#checkShape(data.error, ERROR, at, "the error");
  }

  #checkShape(value, shape, at, what) {
    for (const [field, isRight] of Object.entries(shape)) {
      const name = field.replace("?", "");
      if (name in value) {
        if (!isRight(value[name])) this.#find("wrong_type", at, `${name} of ${what}`);
      } else if (name === field) this.#find("missing_field", at, `${what} has no ${name}`);
    }
  }

  #checkOrder(event, at, data) {
    const { type, run_id: runId } = event;
    let run = this.#runs.get(runId);
    if (run === undefined) {
      const begins = type === "user_message" || type === "agent_started";
      if (!begins && this.#fromStart) {
        this.#find("outside_run", at, `${type} of a run that did not start`);
        return;
      }
      run = {
        id: runId,
        thread: event.thread_id,
        first: at,
        started: !begins,
        ended: false,
        fromStart: begins,
        thought: false,
        open: new Map(),
        calls: new Set(),
      };
      this.#runs.set(runId, run);
    }
    if (type === "user_message") {
      if (run.ended) this.#find("outside_run", at, "a message after its run ended");
    } else if (type === "agent_started") this.#checkStart(event, at, run);
    else if (type === "agent_completed") this.#checkEnd(at, run, data);
    else if (!run.started || run.ended) {
      this.#find("outside_run", at, `${type} ${run.ended ? "after the end" : "before the start"} of its run`);
    } else this.#checkInside(at, type, run, data);
  }

  #checkStart({ thread_id: thread, parent_run_id: parent }, at, run) {
    if (run.started) {
      this.#find("start_repeated", at, `it started at ${run.first}`);
      return;
    }
    Object.assign(run, { started: true, first: at, thread });
    if (!this.#active.has(thread)) this.#active.set(thread, new Set());
    const active = this.#active.get(thread);
    if (parent !== undefined) {
      const known = this.#runs.get(parent);
      if (this.#fromStart && (known === undefined || !known.started || known.ended)) {
        this.#find("interleaved", at, `its parent ${parent} is not running`);
      }
      return;
    }
    const allowed = [run.id, ...active].some((id) => this.#interleaving.has(id));
    if (active.size > 0 && !allowed) this.#nested = { at, runId: run.id };
    active.add(run.id);
  }

  #judgeNested({ type, run_id: runId }, { outcome }) {
    const nested = this.#nested;
    this.#nested = null;
    if (nested === null) return;
    if (type === "agent_completed" && outcome === "cancelled" && runId === nested.runId) return;
    this.#find("interleaved", nested.at, "another run of this thread is running");
  }

  #checkEnd(at, run, { outcome }) {
    if (run.ended) {
      this.#find("end_repeated", at, "it had ended");
      return;
    }
    run.ended = true;
    if (!run.started) {
      this.#find("outside_run", at, "agent_completed before the start of its run");
      return;
    }
    this.#active.get(run.thread)?.delete(run.id);
    for (const [call, executedAt] of run.open) {
      this.#find("tool_not_completed", executedAt, `${call} was never completed`);
    }
    if (outcome === "success" && !run.thought && run.fromStart) {
      this.#find("no_thinking", at, "a success without agent_thinking");
    }
    run.open.clear();
    run.calls.clear();
  }

  #checkInside(at, type, run, { tool_call_id: call }) {
    if (type === "agent_thinking") run.thought = true;
    if (type === "tool_executing" && isText(call)) {
      if (run.calls.has(call)) this.#find("tool_repeated", at, `${call} was executed before`);
      run.calls.add(call);
      run.open.set(call, at);
    }
    if (type === "tool_completed" && isText(call)) {
      const wasOpen = run.open.delete(call);
      if (!wasOpen && (run.fromStart || run.calls.has(call))) {
        this.#find("tool_unknown", at, `${call} is not executing in this run`);
      }
      run.calls.add(call);
    }
  }
}
