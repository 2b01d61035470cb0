"""The manager: the one live object of a user, as a pure machine.

It admits messages, runs agents one after the other per thread, numbers and encodes
every event, and decides who hears it. `handle` takes a command and returns effects;
nothing here does I/O, reads a clock or knows gRPC.

Guarantees: an event is delivered only after the log committed it; at most one append is
in flight; effects wait for the records made before them; every started run ends with
exactly one agent_completed, its tool calls completed before, also when several managers
in turn executed it; a repeated message id is answered with the first result. After a refused
append, a fence, or a release it does nothing more. It does not guarantee to be the only one:
the log's fence does.

Leaving by plan, it goes on serving: messages are stored and wait for the next manager,
open tool calls may end. Only while the last record is on its way is everything turned
away. How runs begin, go on and end is in `runs`; what is written goes through `writing`.

Times: `now_ms` is the boot clock, for limits; `wall_ms` stamps events and decides nothing but
how long a message id is kept.
"""

from collections import deque
from dataclasses import replace
from typing import NoReturn, Self

import orjson

from agent_service.core.commands import (
    AbandonRun,
    AnnounceClient,
    ApplyVerbs,
    AttachEdge,
    CancelRun,
    Command,
    DetachEdge,
    Evict,
    Fence,
    FinishAppend,
    HandOff,
    RecallThought,
    Release,
    SubmitInput,
    SubmitMessage,
)
from agent_service.core.effects import (
    AnswerAccepted,
    AnswerAttached,
    AnswerCancelled,
    AnswerRefused,
    Deliver,
    Effect,
    EndManager,
    ObserveMove,
    TellClientTaken,
)
from agent_service.core.encoding import EventEncoder, title_of
from agent_service.core.facts import (
    MessageAccepted,
    MessageForgotten,
    OwnerChanged,
    RunOpened,
    ThreadTouched,
)
from agent_service.core.grants import Grant, refuse_construction
from agent_service.core.journal import Committed, Fenced, Sealed
from agent_service.core.limits import MessagesPerMinute
from agent_service.core.outgoing import Outgoing
from agent_service.core.policy import ManagerPolicy
from agent_service.core.runs import Runs
from agent_service.core.state import ManagerState
from agent_service.core.writing import StreamWriter
from steward.errors import Reason
from steward.model.keys import EdgeId, Epoch, Sequence, StreamId
from steward.model.verbs import EventType, Outcome, RunKey

KEEP_MESSAGE_IDS = 10_000
KEEP_MESSAGE_MS = 24 * 3600 * 1000
MOST_MESSAGE_IDS = 20_000
"""Each manager reads all of them when it is made, in one step of the loop that serves all users
of its node: some 100 ms for so many. A node that is silent for long is taken for dead."""

MOST_CLIENTS = 256
HANDOFF = "handoff"
"""What a manager that was moved by plan leaves in its last record."""

UNCERTAIN = "the lease is uncertain"
"""What a strict tenant's manager leaves there that had to stop: nobody planned that."""

FAILOVER = "failover"
EVICTED = "evicted"
NO_FENCE = Epoch(0)


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
        encoder = EventEncoder(sealed.stream_id, placement.epoch)
        self._writer = StreamWriter(self._node_id, self.epoch, self._state, self._out, encoder)
        self._runs = Runs(self.user, self.epoch, self._agents, self._state, self._writer)
        self._edges: dict[EdgeId, None] = {}
        # Client id -> the edge that announced it last.
        self._clients: dict[str, EdgeId] = {}
        self._rate = MessagesPerMinute(policy.messages_per_minute)
        self._held: deque[ApplyVerbs | SubmitMessage | CancelRun | SubmitInput] = deque()
        self._begun = False
        self._leaving: Release | HandOff | None = None
        # The last record is on its way: nothing is taken any more.
        self._let_go = False
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

    @property
    def lost_node(self) -> str:
        """Before `begin`: the node whose manager was lost; empty if it let go, or never was."""
        owner = self._state.owner
        return owner.node_id if owner is not None and not owner.released else ""

    def active_keys(self) -> tuple[RunKey, ...]:
        """The executions that this manager has started and not ended."""
        return tuple(self._runs.key(run_id) for run_id in self._state.active.values())

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
            "leaving": self._leaving is not None,
            "over": self.over,
        }

    def next_deadline(self) -> int | None:
        """When to send the `Release` or `HandOff` again; None while the manager stays."""
        return self._leaving.until_ms if self._leaving and not self._let_go else None

    # The machine.

    def begin(self, now_ms: int, wall_ms: int, gap_ms: int | None, trace: str) -> list[Effect]:
        """The first step: go on with what the manager before left open, and with what waits.

        `gap_ms`: how long somebody waited for this manager, 0 if nobody did; None asks for the time
        since the one before let go, by wall clocks that may be those of two machines.
        """
        if self._begun:
            raise RuntimeError("this manager has begun before")
        self._begun = True
        owner = self._state.owner
        lost = owner is not None and not owner.released
        if owner is not None and lost:
            self._move(wall_ms, owner, FAILOVER, gap_ms or 0, trace)
        elif owner is not None and owner.released in (HANDOFF, UNCERTAIN):
            if gap_ms is None:
                gap_ms = max(wall_ms - owner.at_ms, 0) if owner.at_ms else 0
            cause = HANDOFF if owner.released == HANDOFF else FAILOVER
            self._move(wall_ms, owner, cause, gap_ms, trace)
        self._runs.resume(wall_ms, lost=lost)
        return self._proceed(now_ms, wall_ms)

    def handle(self, now_ms: int, command: Command, wall_ms: int) -> list[Effect]:
        """Take one step. After the end every command is ignored and the effects are empty."""
        if self.over:
            return []
        if isinstance(command, FinishAppend):
            return self._finish(now_ms, wall_ms, command)
        if self._let_go and not isinstance(command, Fence):
            return self._turn_away(command)
        match command:
            case ApplyVerbs(verbs) if not self._held:
                rest = self._runs.apply(wall_ms, verbs)
                if rest:
                    self._held.append(ApplyVerbs(rest))
            case AttachEdge():
                return [*self._attach(command), *self._proceed(now_ms, wall_ms)]
            case DetachEdge():
                self._edges.pop(command.edge_id, None)
            case AnnounceClient():
                return self._announce(command)
            case Fence(fence):
                return self._end_manager(fence, Reason.EPOCH_STALE, "fenced")
            case Release() | HandOff():
                self._leave(command)
            case Evict():
                return self._evict(wall_ms, command)
            case RecallThought():
                self._runs.recall_thought(command.run_id)
            case AbandonRun():
                self._abandon(wall_ms, command)
            case _:
                self._held.append(command)
                self._take_held(now_ms, wall_ms)
        return self._proceed(now_ms, wall_ms)

    def _take_held(self, now_ms: int, wall_ms: int) -> None:
        """Do what changes the stream, as long as the next append has room for it."""
        while self._held and not self._out.full:
            match self._held.popleft():
                case ApplyVerbs(verbs):
                    rest = self._runs.apply(wall_ms, verbs)
                    if rest:
                        self._held.appendleft(ApplyVerbs(rest))
                case SubmitMessage() as command:
                    self._submit(now_ms, wall_ms, command)
                case CancelRun() as command:
                    self._cancel(wall_ms, command)
                case SubmitInput() as command:
                    message = "no input is requested under this id"
                    self._refuse(command, Reason.NOT_FOUND, message)

    def trimmed(self, oldest: int) -> None:
        """The log keeps this user's events from `oldest` on; edges that attach are told."""
        self._oldest = max(self._oldest, Sequence(oldest))

    # Edges.

    def _attach(self, command: AttachEdge) -> list[Effect]:
        # Answered at once: what is in flight has a higher sequence and follows as a delivery.
        known = command.edge_id in self._edges
        self._edges[command.edge_id] = None
        attached = AnswerAttached(
            command.edge_id,
            command.command_id,
            self.stream_id,
            self._out.committed,
            self._oldest,
            self._policy.messages_per_minute,
        )
        if known:
            return [attached]
        # After a failover edges come one by one: this one has missed what the others announced.
        missed = [client for client, edge in self._clients.items() if edge != command.edge_id]
        return [attached, *(TellClientTaken((command.edge_id,), client) for client in missed)]

    def _announce(self, command: AnnounceClient) -> list[Effect]:
        self._clients.pop(command.client_id, None)
        self._clients[command.client_id] = command.edge_id
        if len(self._clients) > MOST_CLIENTS:
            del self._clients[next(iter(self._clients))]
        others = tuple(edge_id for edge_id in self._edges if edge_id != command.edge_id)
        return [TellClientTaken(others, command.client_id)] if others else []

    # Messages.

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
        writer = self._writer
        sequence = writer.next
        run_id = writer.run_id()
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
        envelope = writer.envelope(opened)
        writer.emit(wall_ms, EventType.USER_MESSAGE, data, envelope, conversation=True)
        writer.record(accepted)
        self._forget_old(wall_ms)
        title = title_of(command.content)
        writer.record(ThreadTouched(command.thread_id, title, sequence, writer.time(wall_ms)))
        writer.record(opened)
        self._runs.start_next(wall_ms, command.thread_id)
        self._accept(command, accepted, duplicate=False)

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
        """Ids are kept for 24 hours and for the last 10,000 messages, whichever is longer.

        But never more than `MOST_MESSAGE_IDS`.
        """
        while (kept := len(self._state.messages)) > KEEP_MESSAGE_IDS:
            oldest = next(iter(self._state.messages.values()))
            if kept <= MOST_MESSAGE_IDS and oldest.at_ms > wall_ms - KEEP_MESSAGE_MS:
                return
            self._writer.record(MessageForgotten(oldest.id))

    def _cancel(self, wall_ms: int, command: CancelRun) -> None:
        run_id = command.run_id or self._state.active.get(command.thread_id)
        if run_id is None:
            message = "nothing runs in this thread; it may have ended"
            self._refuse(command, Reason.NOT_FOUND, message)
            return
        run = self._state.runs.get(run_id)
        if run is None and run_id not in self._state.run_ids:
            self._refuse(command, Reason.NOT_FOUND, "there is no such run of this user")
            return
        if run is not None:
            self._runs.cancel(wall_ms, run)
        self._out.then(AnswerCancelled(command.edge_id, command.command_id, run_id))
        if run is not None:
            self._runs.start_next(wall_ms, run.opened.thread_id)

    def _abandon(self, wall_ms: int, command: AbandonRun) -> None:
        run = self._state.runs.get(command.run_id)
        if run is None or not run.started:
            return
        run_id, thread_id = command.run_id, run.opened.thread_id
        self._runs.end(wall_ms, run_id, Outcome.FAILED, command.error_type, command.message)
        self._runs.start_next(wall_ms, thread_id)

    # Coming and going.

    def _move(self, wall_ms: int, owner: OwnerChanged, cause: str, gap_ms: int, trace: str) -> None:
        moved: dict[str, object] = {
            "from_node": owner.node_id,
            "to_node": self._node_id,
            "cause": cause,
            "gap_ms": gap_ms,
        }
        data = orjson.dumps(moved)
        self._writer.emit(wall_ms, EventType.MANAGER_MOVED, data, None, trace=orjson.dumps(trace))
        self._out.then(ObserveMove(cause, gap_ms))

    def _leave(self, command: Release | HandOff) -> None:
        """Begin nothing any more. The earliest time counts, and a move before a mere release."""
        before = self._leaving
        if before is not None:
            until_ms = min(before.until_ms, command.until_ms)
            kept = before if isinstance(before, HandOff) else command
            command = replace(kept, until_ms=until_ms)
        self._leaving = command
        self._runs.let_go()

    def _proceed(self, now_ms: int, wall_ms: int) -> list[Effect]:
        """Send what was collected; with the last record, once nothing holds a leaving manager."""
        leaving = self._leaving
        if leaving is not None and not self._let_go:
            if self._runs.at_rest or now_ms >= leaving.until_ms:
                self._write_last(wall_ms, leaving)
        effects = self._out.flush()
        self._close_if_ended(effects)
        return effects

    def _write_last(self, wall_ms: int, leaving: Release | HandOff) -> None:
        handoff = isinstance(leaving, HandOff)
        self._write_end(wall_ms, HANDOFF if handoff else leaving.cause)
        activate = bool(self._state.runs)
        self._out.then(EndManager(NO_FENCE, Reason.MANAGER_MOVED, leaving.cause, handoff, activate))

    def _evict(self, wall_ms: int, command: Evict) -> list[Effect]:
        self._runs.let_go()
        self._runs.cancel_all(wall_ms)
        self._write_end(wall_ms, EVICTED)
        self._out.then(EndManager(NO_FENCE, Reason.USER_EVICTED, command.cause))
        effects = self._out.flush()
        self._close_if_ended(effects)
        return effects

    def _write_end(self, wall_ms: int, released: str) -> None:
        # Edges hear that the manager is lost; they keep what was not answered, and send it again.
        self._held.clear()
        self._let_go = True
        self._writer.disown(wall_ms, released)

    def _turn_away(self, command: Command) -> list[Effect]:
        """While the last record is on its way nothing is taken: the next manager gets it.

        Attached edges are told when it is over, and send again what was not answered; an edge that
        comes only now would not be.
        """
        if isinstance(command, DetachEdge):
            self._edges.pop(command.edge_id, None)
        elif isinstance(command, AttachEdge):
            message = "the manager is moving; resolve again"
            edge_id, reason = command.edge_id, Reason.MANAGER_MOVED
            return [AnswerRefused(edge_id, command.command_id, reason, message)]
        return []

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
                return self._end_manager(NO_FENCE, Reason.EPOCH_STALE, "append conflict")
        flight = self._out.landed()
        effects = flight.effects
        if flight.events and self._edges:
            payloads = tuple([event.payload for event in flight.events])
            effects.insert(0, Deliver(tuple(self._edges), flight.first, flight.last, payloads))
        if self._close_if_ended(effects):
            return effects
        effects += self._proceed(now_ms, wall_ms)
        if self._held:
            self._take_held(now_ms, wall_ms)
            effects += self._proceed(now_ms, wall_ms)
        return effects

    def _close_if_ended(self, effects: list[Effect]) -> bool:
        """Whether this manager is over now, since its end is among `effects`."""
        for effect in effects:  # With each step: twice as fast as a generator.
            if type(effect) is EndManager:
                self.over = True
        return self.over

    def _end_manager(self, fence: Epoch, reason: Reason, cause: str) -> list[Effect]:
        """Over at once: what waited is not released, since nothing of it is known to be stored."""
        self.over = True
        return [EndManager(fence, reason, cause)]
