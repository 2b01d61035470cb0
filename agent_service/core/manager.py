"""The manager: the one live object of a user, as a pure machine.

It admits messages, runs agents one after the other per thread, numbers and encodes
every event, and decides who hears it. `handle` takes a command and returns effects;
nothing here does I/O, reads a clock or knows gRPC.

Guarantees: an event is delivered only after the log committed it; at most one append is
in flight; effects wait for the records made before them; every started run ends with
exactly one agent_completed, its tool calls completed before; a repeated message id is
answered with the first result. After a refused append, a fence, or a release it
does nothing more. It does not guarantee to be the only one: the log's fence does.

Times: `now_ms` is the boot clock, for limits; `wall_ms` stamps events and decides nothing but
how long a message id is kept.
"""

from collections import deque
from typing import NoReturn, Self

import orjson

from agent_service.core.commands import (
    ApplyVerbs,
    AttachEdge,
    CancelRun,
    Command,
    DetachEdge,
    Fence,
    FinishAppend,
    Release,
    SubmitInput,
    SubmitMessage,
)
from agent_service.core.effects import (
    AcknowledgeVerbs,
    AnswerAccepted,
    AnswerAttached,
    AnswerCancelled,
    AnswerRefused,
    CountRun,
    Deliver,
    Effect,
    EndManager,
    StartRun,
    StopRun,
)
from agent_service.core.encoding import EventEncoder, RunEnvelope, run_envelope, title_of
from agent_service.core.facts import (
    CallClosed,
    CallOpened,
    Fact,
    MessageAccepted,
    MessageForgotten,
    OwnerChanged,
    RunClosed,
    RunOpened,
    StateSaved,
    ThreadTouched,
    record_of,
)
from agent_service.core.grants import Grant, refuse_construction
from agent_service.core.journal import Committed, Fenced, Sealed, StoredEvent
from agent_service.core.limits import MessagesPerMinute
from agent_service.core.outgoing import Outgoing
from agent_service.core.policy import ManagerPolicy
from agent_service.core.state import ManagerState, RunState
from steward.errors import Reason
from steward.model.keys import EdgeId, Epoch, RunId, Sequence, StreamId, ThreadId
from steward.model.verbs import (
    EmitEvent,
    EventType,
    FinishRun,
    Outcome,
    RunKey,
    Verb,
    VerbsAcknowledged,
)

KEEP_MESSAGE_IDS = 10_000
KEEP_MESSAGE_MS = 24 * 3600 * 1000
WORKING = b'{"thought":"Working","delta":false}'


class Manager:
    """One user's manager under one epoch. Made by the host of an agent node, from a grant."""

    def __new__(cls, *arguments: object) -> Self:
        if not arguments or not isinstance(arguments[0], Grant):
            refuse_construction("without a grant")
        return super().__new__(cls)

    def __init__(self, grant: Grant, sealed: Sealed, policy: ManagerPolicy) -> None:
        """Spend the grant. Raises RuntimeError without a fresh one."""
        placement = grant.spend()
        self.user = placement.user
        self.epoch = placement.epoch
        self.stream_id: StreamId = sealed.stream_id
        self._node_id = placement.node_id
        self._policy = policy
        self._agents = {agent.name: agent for agent in policy.agents}
        self._oldest = sealed.oldest_sequence
        self._out = Outgoing(placement.user, placement.epoch, sealed)
        self._state = ManagerState(sealed.records)
        self._encoder = EventEncoder(sealed.stream_id, placement.epoch)
        self._envelopes: dict[RunId, RunEnvelope] = {}
        self._edges: dict[EdgeId, None] = {}
        self._rate = MessagesPerMinute(policy.messages_per_minute)
        self._held: deque[ApplyVerbs | SubmitMessage | CancelRun | SubmitInput] = deque()
        self._begun = False
        self._releasing: str | None = None
        self.over = False

    def __init_subclass__(cls) -> None:
        refuse_construction("by a subclass")

    def __reduce_ex__(self, _: object) -> NoReturn:
        refuse_construction("by copying or pickling")

    # What operators and tests may look at.

    @property
    def sequence(self) -> Sequence:
        """The last committed sequence."""
        return self._out.committed

    @property
    def edges(self) -> tuple[EdgeId, ...]:
        return tuple(self._edges)

    @property
    def open_runs(self) -> int:
        return len(self._state.active)

    @property
    def idle(self) -> bool:
        """Nobody listens, nothing runs or waits, and the log has everything."""
        return not (self._edges or self._state.runs or self._out.flight or self._held)

    def active_keys(self) -> tuple[RunKey, ...]:
        """The executions that this manager has started and not ended."""
        return tuple(self._key(run_id) for run_id in self._state.active.values())

    @property
    def waiting_runs(self) -> int:
        return self._state.waiting()

    @property
    def state(self) -> bytes:
        """The user's durable state, as JSON."""
        return self._state.state

    def snapshot(self) -> dict[str, object]:
        """Everything that decides what this machine does next, as plain values."""
        return {
            "user": str(self.user),
            "epoch": self.epoch,
            "next": self._out.next,
            "committed": self._out.committed,
            "runs": sorted(self._state.runs),
            "active": dict(sorted(self._state.active.items())),
            "messages": len(self._state.messages),
            "edges": sorted(self._edges),
            "in_flight": self._out.flight.number if self._out.flight else 0,
            "waiting_events": self._out.collected,
            "over": self.over,
        }

    def next_deadline(self) -> int | None:
        """When to call `handle` although nothing happened; a manager has no timers yet."""
        return None

    # The machine.

    def begin(self, now_ms: int, wall_ms: int, gap_ms: int, trace: str) -> list[Effect]:
        """The first step: end what the manager before left open, and go on with what waits.

        `gap_ms` and `trace` are those of the attach that caused the activation.
        """
        if self._begun:
            raise RuntimeError("this manager has begun before")
        self._begun = True
        owner = self._state.owner
        if owner is not None and not owner.released:
            self._move(wall_ms, owner, "failover", gap_ms, trace)
        elif owner is not None and owner.released == "handoff":
            self._move(wall_ms, owner, "handoff", gap_ms, trace)
        for run_id in list(self._state.active.values()):
            message = "The node that ran this was lost."
            self._end(wall_ms, run_id, Outcome.INTERRUPTED, "Interrupted", message)
        for thread_id in list(self._state.queues):
            self._start_next(wall_ms, thread_id)
        return self._flush()

    def handle(self, now_ms: int, command: Command, wall_ms: int) -> list[Effect]:
        """Take one step. After the end every command is ignored and the effects are empty."""
        if self.over:
            return []
        if self._releasing is not None and not isinstance(command, FinishAppend | Fence):
            self._turn_away(command)
            return self._flush()
        match command:
            case FinishAppend():
                return self._finish(now_ms, wall_ms, command)
            case AttachEdge():
                return self._attach(command)
            case DetachEdge():
                self._edges.pop(command.edge_id, None)
            case Fence(fence):
                return self._end_manager(fence, Reason.EPOCH_STALE, "fenced")
            case Release():
                return self._release(command)
            case _:
                self._held.append(command)
                self._take_held(now_ms, wall_ms)
        return self._flush()

    def _take_held(self, now_ms: int, wall_ms: int) -> None:
        """Do what changes the stream, as long as the next append has room for it."""
        while self._held and not self._out.full:
            match self._held.popleft():
                case ApplyVerbs(verbs):
                    rest = self._apply(wall_ms, verbs)
                    if rest:
                        self._held.appendleft(ApplyVerbs(rest))
                case SubmitMessage() as command:
                    self._submit(now_ms, wall_ms, command)
                case CancelRun() as command:
                    self._cancel(wall_ms, command)
                case SubmitInput() as command:
                    message = "no input is requested under this id"
                    self._refuse(command, Reason.NOT_FOUND, message)

    def _attach(self, command: AttachEdge) -> list[Effect]:
        # Answered at once: what is in flight has a higher sequence and follows as a delivery.
        self._edges[command.edge_id] = None
        return [
            AnswerAttached(
                command.edge_id,
                command.command_id,
                self.stream_id,
                self._out.committed,
                self._oldest,
                self._policy.messages_per_minute,
            )
        ]

    def _submit(self, now_ms: int, wall_ms: int, command: SubmitMessage) -> None:
        known = self._state.messages.get(command.id)
        if known is not None:
            self._accept(command, known, duplicate=True)
            return
        agent = self._agents.get(command.agent) if command.agent else self._policy.agents[0]
        if agent is None:
            names = ", ".join(self._agents)
            message = f"there is no such agent; this cluster serves: {names}"
            self._refuse(command, Reason.NOT_FOUND, message)
            return
        overlap = command.overlap or agent.overlap
        busy = command.thread_id in self._state.active
        if overlap == "reject" and busy:
            message = "a run of this thread is active; send again when it has ended"
            self._refuse(command, Reason.OVERLAP_REJECTED, message)
            return
        if overlap not in ("queue", "reject"):
            message = "this overlap policy is not available yet; use queue or reject"
            self._refuse(command, Reason.PROTOCOL_VIOLATION, message)
            return
        if busy and self._state.waiting() >= self._policy.max_waiting_runs:
            message = f"{self._policy.max_waiting_runs} runs wait already; send when one has ended"
            self._refuse(command, Reason.QUEUE_FULL, message, 1000)
            return
        wait_ms = self._rate.take(now_ms)
        if wait_ms:
            message = f"more than {self._rate.limit} messages a minute; send again later"
            self._refuse(command, Reason.RATE_LIMITED, message, wait_ms)
            return
        self._admit(wall_ms, command, agent.name)

    def _admit(self, wall_ms: int, command: SubmitMessage, agent: str) -> None:
        sequence = self._out.next
        run_id = self._encoder.run_id(sequence)
        opened = RunOpened(
            run_id,
            command.thread_id,
            agent,
            sequence,
            command.content,
            command.traceparent,
            started_ms=0,
        )
        accepted = MessageAccepted(command.id, run_id, sequence, wall_ms)
        data = b'{"id":%b,"content":%b}' % (orjson.dumps(command.id), command.content)
        envelope = self._envelope(opened)
        self._emit(wall_ms, EventType.USER_MESSAGE, data, envelope, conversation=True)
        self._record(accepted)
        self._forget_old(wall_ms)
        title = title_of(command.content)
        self._record(ThreadTouched(command.thread_id, title, sequence, self._encoder.time(wall_ms)))
        self._record(opened)
        if command.thread_id not in self._state.active:
            self._start_next(wall_ms, command.thread_id)
        self._accept(command, accepted, duplicate=False)

    def _start_next(self, wall_ms: int, thread_id: ThreadId) -> None:
        queue = self._state.queues.get(thread_id)
        if not queue or thread_id in self._state.active:
            return
        waiting = self._state.runs[queue[0]].opened
        started = RunOpened(
            waiting.run_id,
            waiting.thread_id,
            waiting.agent,
            waiting.sequence,
            waiting.content,
            waiting.traceparent,
            started_ms=max(wall_ms, 1),
        )
        self._record(started)
        self._emit_started(wall_ms, started)
        self._out.then(
            StartRun(
                self._key(started.run_id),
                started.agent,
                thread_id,
                started.content,
                1,
                started.traceparent,
                Sequence(self._out.next - 1),
            )
        )

    def _emit_started(self, wall_ms: int, opened: RunOpened) -> None:
        data = b'{"input":%b,"attempt":1}' % opened.content
        self._emit(wall_ms, EventType.AGENT_STARTED, data, self._envelope(opened))

    def _apply(self, wall_ms: int, verbs: tuple[Verb, ...]) -> tuple[Verb, ...]:
        """Apply verbs up to a full append; returns those that are left."""
        acknowledged: dict[RunKey, int] = {}
        taken = 0
        for verb in verbs:
            if self._out.full:
                break
            taken += 1
            run = self._state.runs.get(verb.key.run_id)
            if run is None or verb.key.epoch != self.epoch or not run.started:
                continue  # Of a run that was cancelled, or of another manager's execution.
            if verb.number != run.verbs + 1:
                continue  # A repeat; numbers have no gaps.
            run.verbs = verb.number
            acknowledged[verb.key] = verb.number
            if isinstance(verb, FinishRun):
                self._finish_run(wall_ms, run, verb)
            else:
                self._emit_verb(wall_ms, run, verb)
        for key, number in acknowledged.items():
            self._out.then(AcknowledgeVerbs(VerbsAcknowledged(key, number)))
        return verbs[taken:]

    def _emit_verb(self, wall_ms: int, run: RunState, verb: EmitEvent) -> None:
        if verb.type is EventType.AGENT_THINKING:
            run.thought = True
        elif verb.type in (EventType.AGENT_TEXT, EventType.TOOL_EXECUTING):
            self._think_first(wall_ms, run)
        self._emit(wall_ms, verb.type, verb.data, self._envelope(run.opened))
        if verb.type is EventType.TOOL_EXECUTING:
            tool = orjson.loads(verb.data)["tool_name"]
            self._record(CallOpened(verb.tool_call_id, run.opened.run_id, tool, wall_ms))
        elif verb.type is EventType.TOOL_COMPLETED:
            self._record(CallClosed(verb.tool_call_id))
        if verb.state:
            self._record(StateSaved(verb.state))

    def _finish_run(self, wall_ms: int, run: RunState, verb: FinishRun) -> None:
        if verb.outcome is Outcome.SUCCESS:
            self._think_first(wall_ms, run)
        message = "The agent ended before this call did."
        self._close_calls(wall_ms, run, "Abandoned", message)
        self._complete(wall_ms, run, verb.outcome, verb.data)

    def _think_first(self, wall_ms: int, run: RunState) -> None:
        if not run.thought:
            run.thought = True
            envelope = self._envelope(run.opened)
            self._emit(wall_ms, EventType.AGENT_THINKING, WORKING, envelope)

    def _cancel(self, wall_ms: int, command: CancelRun) -> None:
        run_id = command.run_id or self._state.active.get(command.thread_id)
        if run_id is None:
            message = "nothing runs in this thread; it may have ended"
            self._refuse(command, Reason.NOT_FOUND, message)
            return
        run = self._state.runs.get(run_id)
        if run is None:
            if run_id in self._state.run_ids:
                self._out.then(AnswerCancelled(command.edge_id, command.command_id, run_id))
            else:
                self._refuse(command, Reason.NOT_FOUND, "there is no such run of this user")
            return
        if not run.started:
            # A run has exactly one start and one end, also when it never got its turn.
            self._emit_started(wall_ms, run.opened)
        self._end(wall_ms, run_id, Outcome.CANCELLED, "Cancelled", "The run was cancelled.")
        self._out.then(AnswerCancelled(command.edge_id, command.command_id, run_id))
        self._start_next(wall_ms, run.opened.thread_id)

    def _end(
        self, wall_ms: int, run_id: RunId, outcome: Outcome, error_type: str, message: str
    ) -> None:
        """End a run from outside of its agent; the caller decides what runs next."""
        run = self._state.runs[run_id]
        self._close_calls(wall_ms, run, error_type, message)
        error = {"type": error_type, "message": message}
        data = orjson.dumps({"outcome": outcome.value, "response": "", "error": error})
        self._out.then(StopRun(self._key(run_id)))
        self._complete(wall_ms, run, outcome, data, start_next=False)

    def _close_calls(self, wall_ms: int, run: RunState, error_type: str, message: str) -> None:
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
            self._emit(wall_ms, EventType.TOOL_COMPLETED, data, self._envelope(run.opened))
            self._record(CallClosed(call.call_id))

    def _complete(
        self,
        wall_ms: int,
        run: RunState,
        outcome: Outcome,
        data: bytes,
        *,
        start_next: bool = True,
    ) -> None:
        opened = run.opened
        duration_ms = max(wall_ms - opened.started_ms, 0) if run.started else 0
        data = b'%b,"duration_ms":%d}' % (data[:-1], duration_ms)
        envelope = self._envelope(opened)
        sequence = self._out.next
        self._emit(wall_ms, EventType.AGENT_COMPLETED, data, envelope, conversation=True)
        self._record(RunClosed(opened.run_id))
        self._record(ThreadTouched(opened.thread_id, "", sequence, self._encoder.time(wall_ms)))
        self._envelopes.pop(opened.run_id, None)
        self._out.then(CountRun(self._key(opened.run_id), outcome))
        if start_next:
            self._start_next(wall_ms, opened.thread_id)

    def _move(self, wall_ms: int, owner: OwnerChanged, cause: str, gap_ms: int, trace: str) -> None:
        moved: dict[str, object] = {
            "from_node": owner.node_id,
            "to_node": self._node_id,
            "cause": cause,
            "gap_ms": gap_ms,
        }
        self._emit(
            wall_ms, EventType.MANAGER_MOVED, orjson.dumps(moved), None, trace=orjson.dumps(trace)
        )

    def _turn_away(self, command: Command) -> None:
        """After a release nothing is taken: the next manager gets what the edges keep."""
        if isinstance(command, SubmitMessage | CancelRun | SubmitInput):
            self._refuse(command, Reason.MANAGER_MOVED, "the manager is moving; resolve again")
        elif isinstance(command, DetachEdge):
            self._edges.pop(command.edge_id, None)
        elif isinstance(command, AttachEdge):
            message = "the manager is moving; resolve again"
            self._out.then(
                AnswerRefused(command.edge_id, command.command_id, Reason.MANAGER_MOVED, message)
            )

    def _release(self, command: Release) -> list[Effect]:
        self._releasing = command.cause
        for held in self._held:
            self._turn_away(held)
        self._held.clear()
        owner = self._state.owner
        if owner is not None and owner.epoch == self.epoch:
            self._record(OwnerChanged(self._node_id, self.epoch, command.cause))
        self._out.then(EndManager(Epoch(0), Reason.MANAGER_MOVED, command.cause))
        return self._flush()

    # Appends and what waits for them.

    def _emit(
        self,
        wall_ms: int,
        type: EventType,
        data: bytes,
        envelope: RunEnvelope | None,
        *,
        conversation: bool = False,
        trace: bytes = b"",
    ) -> None:
        owner = self._state.owner
        if owner is None or owner.epoch != self.epoch:
            # With the first event and not before: who wrote nothing needs no successor's notice.
            self._record(OwnerChanged(self._node_id, self.epoch, ""))
        payload = self._encoder.encode(type, self._out.next, wall_ms, data, envelope, trace)
        thread_id = envelope.thread_id if envelope else ""
        self._out.event(StoredEvent(payload, thread_id, conversation), type)

    def _record(self, fact: Fact) -> None:
        self._state.evolve(fact)
        self._out.record(record_of(fact))

    def _flush(self) -> list[Effect]:
        return self._close_if_ended(self._out.flush())

    def _finish(self, now_ms: int, wall_ms: int, command: FinishAppend) -> list[Effect]:
        in_flight = self._out.flight
        if in_flight is None or in_flight.number != command.append_number:
            return []
        match command.outcome:
            case Committed():
                pass
            case Fenced(fence):
                return self._end_manager(fence, Reason.EPOCH_STALE, "append fenced")
            case _:
                return self._end_manager(Epoch(0), Reason.EPOCH_STALE, "append conflict")
        flight = self._out.landed()
        effects: list[Effect] = []
        if flight.events and self._edges:
            payloads = tuple(event.payload for event in flight.events)
            effects.append(Deliver(tuple(self._edges), flight.first, flight.last, payloads))
        effects.extend(flight.effects)
        ended = self._close_if_ended(effects)
        if self.over:
            return ended
        ended.extend(self._flush())
        self._take_held(now_ms, wall_ms)
        ended.extend(self._flush())
        return ended

    def _close_if_ended(self, effects: list[Effect]) -> list[Effect]:
        if any(isinstance(effect, EndManager) for effect in effects):
            self.over = True
        return effects

    def _end_manager(self, fence: Epoch, reason: Reason, cause: str) -> list[Effect]:
        """Over at once: what waited is not released, since nothing of it is known to be stored."""
        self.over = True
        return [EndManager(fence, reason, cause)]

    # Small parts.

    def _key(self, run_id: RunId) -> RunKey:
        return RunKey(self.user, self.epoch, run_id)

    def _envelope(self, opened: RunOpened) -> RunEnvelope:
        envelope = self._envelopes.get(opened.run_id)
        if envelope is None:
            envelope = run_envelope(
                opened.thread_id, opened.run_id, opened.agent, opened.traceparent
            )
            self._envelopes[opened.run_id] = envelope
        return envelope

    def _accept(
        self, command: SubmitMessage, accepted: MessageAccepted, *, duplicate: bool
    ) -> None:
        self._out.then(
            AnswerAccepted(
                command.edge_id,
                command.command_id,
                command.id,
                accepted.run_id,
                accepted.sequence,
                duplicate,
                self._state.queue_position(accepted.run_id),
            )
        )

    def _refuse(
        self,
        command: SubmitMessage | CancelRun | SubmitInput,
        reason: Reason,
        message: str,
        retry_after_ms: int = 0,
    ) -> None:
        self._out.then(
            AnswerRefused(command.edge_id, command.command_id, reason, message, retry_after_ms)
        )

    def _forget_old(self, wall_ms: int) -> None:
        """Ids are kept for 24 hours and for the last 10,000 messages, whichever is longer."""
        while len(self._state.messages) > KEEP_MESSAGE_IDS:
            oldest = next(iter(self._state.messages.values()))
            if oldest.at_ms > wall_ms - KEEP_MESSAGE_MS:
                return
            self._record(MessageForgotten(oldest.id))
