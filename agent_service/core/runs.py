"""The runs of one user: queued, started, told by verbs, resumed by a later manager, ended.

Guarantees: one run at a time per thread; a started run ends with exactly one
agent_completed, its tool calls completed before, over all its attempts; a later attempt
emits no second start and loses no finished call or step; verbs of another execution,
and those that come twice, change nothing.

Leaving: after `let_go` no run and no tool begins. A run stops at its *boundary*, which
is when no tool call of this execution is open; the next attempt takes it up from there. An
agent that does not resume has its boundary at its end.
"""

from collections.abc import Mapping
from dataclasses import replace

import orjson

from agent_service.core.effects import AcknowledgeVerbs, CountRun, StartRun, StopRun
from agent_service.core.facts import (
    CallClosed,
    CallOpened,
    RunClosed,
    RunOpened,
    StateSaved,
    StepForgotten,
    StepRecorded,
    ThreadTouched,
)
from agent_service.core.policy import AgentPolicy
from agent_service.core.state import ManagerState, RunState
from agent_service.core.writing import StreamWriter
from steward.model.keys import Epoch, RunId, Sequence, ThreadId, UserKey
from steward.model.verbs import (
    EmitEvent,
    EventType,
    FinishRun,
    Outcome,
    RecordStep,
    RepeatCall,
    RunKey,
    Verb,
    VerbsAcknowledged,
)

MOST_CRASHES = 3
"""A run that was lost with its node so often is not begun again: it may be the cause."""

WORKING = b'{"thought":"Working","delta":false}'


class Runs:
    """The part of a manager that executes; see the module. Only `Manager` makes one."""

    __slots__ = ("_agents", "_epoch", "_leaving", "_state", "_user", "_writer")

    def __init__(
        self,
        user: UserKey,
        epoch: Epoch,
        agents: Mapping[str, AgentPolicy],
        state: ManagerState,
        writer: StreamWriter,
    ) -> None:
        self._user = user
        self._epoch = epoch
        self._agents = agents
        self._state = state
        self._writer = writer
        self._leaving = False

    def key(self, run_id: RunId) -> RunKey:
        """This manager's execution of a run."""
        return RunKey(self._user, self._epoch, run_id)

    # Beginning.

    def start_next(self, wall_ms: int, thread_id: ThreadId) -> None:
        """Start the run that waits longest in this thread, if none is active."""
        queue = self._state.queues.get(thread_id)
        if not queue or thread_id in self._state.active or self._leaving:
            return
        started = replace(self._state.runs[queue[0]].opened, started_ms=max(wall_ms, 1))
        self._writer.record(started)
        self._emit_started(wall_ms, started)
        self._writer.then(
            StartRun(
                self.key(started.run_id),
                started.agent,
                thread_id,
                started.content,
                started.attempt,
                started.traceparent,
                Sequence(self._writer.next - 1),
            )
        )

    def resume(self, wall_ms: int, *, lost: bool) -> None:
        """Go on with what the manager before left open. `lost`: it died, and did not let go."""
        for run_id in list(self._state.active.values()):
            run = self._state.runs[run_id]
            crashes = run.opened.crashes + lost
            if not self._resumes(run):
                how = "was lost" if lost else "was stopped"
                message = f"The node that ran this {how}, and this agent does not resume."
                self.end(wall_ms, run_id, Outcome.FAILED, "Interrupted", message)
            elif crashes >= MOST_CRASHES:
                message = f"The node that ran this was lost, {crashes} times in all."
                self.end(wall_ms, run_id, Outcome.INTERRUPTED, "Interrupted", message)
            else:
                self._begin_again(run, crashes)
        for thread_id in list(self._state.queues):
            self.start_next(wall_ms, thread_id)

    def _begin_again(self, run: RunState, crashes: int) -> None:
        opened = replace(run.opened, attempt=run.opened.attempt + 1, crashes=crashes)
        self._writer.own()
        self._writer.record(opened)
        self._writer.then(
            StartRun(
                self.key(opened.run_id),
                opened.agent,
                opened.thread_id,
                opened.content,
                opened.attempt,
                opened.traceparent,
                Sequence(self._writer.next - 1),
                opened.sequence,
                tuple(run.steps.items()),
            )
        )
        # The values travel with the effect; what is kept is which records to delete.
        run.steps = dict.fromkeys(run.steps, b"")

    def recall_thought(self, run_id: RunId) -> None:
        """An earlier attempt has thought: rule 3 is kept already."""
        run = self._state.runs.get(run_id)
        if run is not None:
            run.thought = True

    def _emit_started(self, wall_ms: int, opened: RunOpened) -> None:
        data = b'{"input":%b,"attempt":1}' % opened.content
        envelope = self._writer.envelope(opened)
        self._writer.emit(wall_ms, EventType.AGENT_STARTED, data, envelope)

    # Verbs.

    def apply(self, wall_ms: int, verbs: tuple[Verb, ...]) -> tuple[Verb, ...]:
        """Apply verbs up to a full append; returns those that are left."""
        # The last of each run that was taken.
        acknowledged: dict[RunId, Verb] = {}
        taken = 0
        for verb in verbs:
            if self._writer.full:
                break
            taken += 1
            _, epoch, run_id = verb.key
            run = self._state.runs.get(run_id)
            if run is None or epoch != self._epoch or not run.started or run.stopped:
                continue  # Of a run that was ended, or of another manager's execution.
            if self._leaving and self._cuts(run, verb):
                self._salvage(wall_ms, run, verb)
            elif verb.number == run.verbs + 1:  # Else a repeat; numbers have no gaps.
                run.verbs = verb.number
                acknowledged[run_id] = verb
                self._take(wall_ms, run, verb)
            if self._leaving:
                self._stop_at_boundary(run)
        for verb in acknowledged.values():
            self._writer.then(AcknowledgeVerbs(VerbsAcknowledged(verb.key, verb.number)))
        return verbs[taken:] if taken < len(verbs) else ()

    def _take(self, wall_ms: int, run: RunState, verb: Verb) -> None:
        match verb:
            case EmitEvent():
                self._emit_verb(wall_ms, run, verb)
            case FinishRun():
                self._finish(wall_ms, run, verb)
            case RecordStep():
                self._record_step(run, verb)
            case RepeatCall():
                # The intent again, now under this epoch: the tool starts when it is stored.
                call = run.calls.get(verb.tool_call_id)
                if call is not None:
                    run.executing.add(call.call_id)
                    self._writer.own()
                    self._writer.record(call)

    def _emit_verb(self, wall_ms: int, run: RunState, verb: EmitEvent) -> None:
        if verb.type is EventType.AGENT_THINKING:
            run.thought = True
        elif verb.type in (EventType.AGENT_TEXT, EventType.TOOL_EXECUTING):
            self._think_first(wall_ms, run)
        elif verb.type is EventType.TOOL_COMPLETED and verb.tool_call_id not in run.calls:
            return  # A call is completed once, whatever an agent's code does.
        self._writer.emit(wall_ms, verb.type, verb.data, self._writer.envelope(run.opened))
        if verb.type is EventType.TOOL_EXECUTING:
            tool = orjson.loads(verb.data)["tool_name"]
            call = CallOpened(verb.tool_call_id, run.opened.run_id, tool, wall_ms)
            self._writer.record(call)
            run.executing.add(verb.tool_call_id)
        elif verb.type is EventType.TOOL_COMPLETED:
            self._writer.record(CallClosed(verb.tool_call_id))
        if verb.state:
            self._writer.record(StateSaved(verb.state))

    def _record_step(self, run: RunState, verb: RecordStep) -> None:
        self._writer.own()
        self._writer.record(StepRecorded(run.opened.run_id, verb.step_id, verb.value))
        # Nobody here reads it: a later manager gets it from the log.
        run.steps[verb.step_id] = b""

    def _finish(self, wall_ms: int, run: RunState, verb: FinishRun) -> None:
        if verb.outcome is Outcome.SUCCESS:
            self._think_first(wall_ms, run)
        message = "The agent ended before this call did."
        self._close_calls(wall_ms, run, "Abandoned", message)
        self._complete(wall_ms, run, verb.outcome, verb.data)
        self.start_next(wall_ms, run.opened.thread_id)

    def _think_first(self, wall_ms: int, run: RunState) -> None:
        if not run.thought:
            run.thought = True
            envelope = self._writer.envelope(run.opened)
            self._writer.emit(wall_ms, EventType.AGENT_THINKING, WORKING, envelope)

    # Ending from outside of the agent.

    def cancel(self, wall_ms: int, run: RunState) -> None:
        """End a run as cancelled; one that waits is started for it. Nothing else is started."""
        if not run.started:
            # A run has exactly one start and one end, also when it never got its turn.
            self._emit_started(wall_ms, run.opened)
        run_id = run.opened.run_id
        self.end(wall_ms, run_id, Outcome.CANCELLED, "Cancelled", "The run was cancelled.")

    def cancel_all(self, wall_ms: int) -> None:
        """End every run as cancelled: those that execute first, then those that wait."""
        waiting = [run_id for queue in self._state.queues.values() for run_id in queue]
        for run_id in [*self._state.active.values(), *waiting]:
            self.cancel(wall_ms, self._state.runs[run_id])

    def end(
        self, wall_ms: int, run_id: RunId, outcome: Outcome, error_type: str, message: str
    ) -> None:
        """End a run from outside of its agent; the caller decides what runs next."""
        run = self._state.runs[run_id]
        self._close_calls(wall_ms, run, error_type, message)
        error = {"type": error_type, "message": message}
        data = orjson.dumps({"outcome": outcome.value, "response": "", "error": error})
        self._writer.then(StopRun(self.key(run_id)))
        self._complete(wall_ms, run, outcome, data)

    def _close_calls(self, wall_ms: int, run: RunState, error_type: str, message: str) -> None:
        envelope = self._writer.envelope(run.opened)
        for call in list(run.calls.values()):
            data = orjson.dumps(
                {
                    "tool_call_id": call.call_id,
                    "tool_name": call.tool,
                    "success": False,
                    "error": {"type": error_type, "message": message},
                    "duration_ms": max(wall_ms - call.at_ms, 0),
                }
            )
            self._writer.emit(wall_ms, EventType.TOOL_COMPLETED, data, envelope)
            self._writer.record(CallClosed(call.call_id))

    def _complete(self, wall_ms: int, run: RunState, outcome: Outcome, data: bytes) -> None:
        writer, opened = self._writer, run.opened
        duration_ms = max(wall_ms - opened.started_ms, 0) if run.started else 0
        data = b'%b,"duration_ms":%d}' % (data[:-1], duration_ms)
        sequence = writer.next
        envelope = writer.envelope(opened)
        writer.emit(wall_ms, EventType.AGENT_COMPLETED, data, envelope, conversation=True)
        for step_id in list(run.steps):
            writer.record(StepForgotten(opened.run_id, step_id))
        writer.record(RunClosed(opened.run_id))
        writer.record(ThreadTouched(opened.thread_id, "", sequence, writer.time(wall_ms)))
        writer.forget(opened.run_id)
        writer.then(CountRun(self.key(opened.run_id), outcome))

    # Leaving.

    def let_go(self) -> None:
        """Begin nothing any more, and stop what is at a boundary. Safe to call twice."""
        self._leaving = True
        for run_id in self._state.active.values():
            self._stop_at_boundary(self._state.runs[run_id])

    @property
    def at_rest(self) -> bool:
        """Whether every run has ended or was stopped at a boundary."""
        runs = self._state.runs
        return all(runs[run_id].stopped for run_id in self._state.active.values())

    def _stop_at_boundary(self, run: RunState) -> None:
        if run.stopped or run.executing or not self._resumes(run):
            return
        run.stopped = True
        # After the StartRun that may still wait for the log.
        self._writer.then(StopRun(self.key(run.opened.run_id)))

    def _cuts(self, run: RunState, verb: Verb) -> bool:
        """Whether this verb is past the boundary: a tool would begin, or one was held back."""
        if not run.cut and self._resumes(run):
            begins = isinstance(verb, EmitEvent) and verb.type is EventType.TOOL_EXECUTING
            run.cut = begins or isinstance(verb, RepeatCall)
        return run.cut

    def _salvage(self, wall_ms: int, run: RunState, verb: Verb) -> None:
        """Of what follows a cut, keep results: nobody should make them twice.

        Not acknowledged, since that would start the tool which was held back.
        """
        if isinstance(verb, RecordStep):
            self._record_step(run, verb)
        elif isinstance(verb, EmitEvent) and verb.tool_call_id in run.executing:
            self._emit_verb(wall_ms, run, verb)

    def _resumes(self, run: RunState) -> bool:
        agent = self._agents.get(run.opened.agent)
        return agent is None or agent.on_crash != "fail"
