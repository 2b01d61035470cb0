"""`Audience`: all connections of one user at this edge, and their tie to the user's manager.

It drives the user's `Attachment` and hands live batches to the sessions. The epoch of
every delivery is compared with the attached one before anything else (P15). Each batch is
framed once, whatever the number of connections. It lives from the user's first
connection or request until nobody has needed it for a while.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from edge.core.attachment import Attachment
from edge.core.attachment_values import (
    Behind,
    ClientCame,
    ClientLeft,
    Command,
    Effect,
    EndClient,
    EndSessions,
    HeadKnown,
    HeadRefreshed,
    Occupied,
    Over,
    Resolved,
    ResolveFailed,
    ResolveManager,
    SearchFailed,
    SendCommand,
    Settle,
    Submit,
    Tick,
    Trimmed,
    Vacated,
)
from edge.core.batch import EventBatch
from edge.core.commands import Accepted, CommandOutcome, Delivery, SubmitMessage, UserCommand
from edge.core.resume import StreamHead, is_ahead
from edge.core.session import SessionState
from edge.core.session_values import (
    AttachFailed,
    CommandSettled,
    End,
    ReadPage,
    StreamAttached,
)
from edge.host.connection import Connection
from edge.host.spans import Arrival, EdgeSpans
from edge.host.timing import DeliveryTimes
from edge.host.wheel import TimerWheel
from edge.uplink.port import Nodes, Registry
from steward.errors import Reason, StewardError
from steward.model.deliveries import user_check
from steward.model.keys import NodeIncarnation, StreamId, UserKey
from steward.model.placement import Placement
from steward.model.violations import ViolationKind
from steward.runtime.clock import boot_ms
from steward.telemetry.logs import BUG, fields

_log = logging.getLogger(__name__)

# No delivery is of it.
NO_EPOCH = -1

Outcome = Callable[[CommandOutcome], None]


class Surroundings(Protocol):
    """What audiences and connections share: the edge around them."""

    registry: Registry
    nodes: Nodes
    wheel: TimerWheel
    spans: EdgeSpans
    times: DeliveryTimes

    def read_page(self, audience: "Audience", connection: Connection, page: ReadPage) -> None: ...

    def check_token(self, connection: Connection, token: str) -> None: ...

    def attached(self, connection: Connection) -> None: ...

    def received(self) -> None: ...

    def refused(self, reason: str) -> None: ...

    def report(
        self,
        kind: ViolationKind,
        evidence: str,
        user: UserKey,
        epoch: int = 0,
        node: NodeIncarnation | None = None,
    ) -> None: ...

    def events_lost(self, number: int) -> None: ...

    def leaving(self, connection: Connection, code: int) -> None: ...

    def lost(self, connection: Connection) -> None: ...

    def over(self, audience: "Audience") -> None: ...


class Audience:
    """One user's connections at this edge. Implements `Owner` and `Timed`."""

    __slots__ = (
        "_around",
        "_live_epoch",
        "_live_source",
        "_outcomes",
        "_tickets",
        "_visitors",
        "attachment",
        "channel",
        "check",
        "connections",
        "sequence",
        "traces",
        "user",
        "wheel_slot",
    )

    def __init__(
        self, around: Surroundings, user: UserKey, attachment: Attachment, channel: int
    ) -> None:
        """`channel` is what the attachment tells nodes."""
        self.user = user
        self.channel = channel
        self.check = user_check(user)
        self.attachment = attachment
        # Replaced, never changed: it may be walked while somebody leaves.
        self.connections: tuple[Connection, ...] = ()
        # The last event of the stream that this edge has seen.
        self.sequence = 0
        # Of events that are announced as sampled and still to come; None: of none.
        self.traces: OrderedDict[int, str] | None = None
        self.wheel_slot = 0
        self._around = around
        # Of the attachment, at hand: the epoch whose deliveries are taken, and whose these are,
        # once somebody's were.
        self._live_epoch = NO_EPOCH
        self._live_source: NodeIncarnation | None = None
        self._visitors = 0
        self._tickets = 0
        self._outcomes: dict[int, Outcome] = {}

    # ---- the hot path

    def deliver(self, source: NodeIncarnation, delivery: Delivery) -> int | None:
        """Hand stored events to every connection. How many took them; None: nobody may."""
        _, epoch, first, events = delivery
        attachment = self.attachment
        if epoch != attachment.live_epoch or source != attachment.live_node:
            return None
        batch = EventBatch(first, events)
        if batch.last > self.sequence:
            self.sequence = batch.last
        taken = 0
        for connection in self.connections:
            if connection.deliver(batch):
                taken += 1
        return taken

    def deliver_frames(
        self,
        now_ms: int,
        source: NodeIncarnation,
        epoch: int,
        first: int,
        count: int,
        frames: bytes,
    ) -> int | None:
        """The same for events that the node has framed."""
        if epoch != self._live_epoch:
            return None
        if source is not self._live_source:
            if source != self.attachment.live_node:
                return None
            self._live_source = source
        following = first + count
        if following > self.sequence:
            self.sequence = following - 1
        taken = 0
        batch: EventBatch | None = None
        for connection in self.connections:
            if connection.take(now_ms, first, following, frames):
                taken += 1
                continue
            if batch is None:
                batch = EventBatch.framed(first, count, frames)
            if connection.deliver(batch):
                taken += 1
        return taken

    def announced(self, sequence: int, traceparent: str) -> None:
        """This event is sampled; it comes with the deliveries that follow."""
        self.traces = self._around.spans.announced(self.traces, sequence, traceparent)

    def trace(self, first: int, following: int, epoch: int, began_ns: int) -> None:
        """Of the events that were just delivered, some were announced, perhaps."""
        traces = self.traces
        if traces is not None:
            spans = self._around.spans
            self.traces = spans.delivered(
                traces, self.connections, first, following, epoch, began_ns
            )

    # ---- who is here

    def join(self, connection: Connection, trace: str = "") -> None:
        """A new connection; an older one with the same client id ends at once.

        `trace`: what finding the manager belongs to, if that is sampled.
        """
        if connection.client_id:
            for other in self.connections:
                if other.client_id == connection.client_id:
                    other.handle(End(Reason.CONNECTION_REPLACED))
            self.handle(ClientCame(connection.client_id))
        self.connections = (*self.connections, connection)
        head = self.attachment.head(self.sequence)
        if head is not None and is_ahead(connection.session.point, head):
            # It comes from a faster edge: only the manager knows how far the stream is.
            self.handle(Behind())
        elif head is not None:
            self._attach(connection, head)
        self.handle(Occupied(trace))

    def enter(self, trace: str = "") -> None:
        """Somebody without a connection needs the manager, until `exit`. `trace` as at `join`."""
        self._visitors += 1
        self.handle(Occupied(trace))

    def search_again(self, cause: str) -> None:
        """What is done to find the next manager belongs to a trace of its own."""
        trace = self._around.spans.again(self.connections, cause)
        if trace:
            self.attachment.trace = trace

    def exit(self) -> None:
        self._visitors -= 1
        self._vacate()

    def command(
        self,
        arrival: Arrival,
        body: UserCommand,
        outcome: Outcome,
        connection: Connection | None = None,
    ) -> str:
        """Send a command; `outcome` is called once, if the manager ever answers. Its trace."""
        trace, answered = self._around.spans.receive(connection, arrival, body)
        if answered is not None:
            outcome = _both(answered, outcome)
        self._tickets += 1
        self._outcomes[self._tickets] = outcome
        self.handle(Submit(self._tickets, trace, body))
        return trace

    # ---- the attachment

    @property
    def placement(self) -> Placement | None:
        return self.attachment.placement

    def handle(self, command: Command) -> None:
        """Give a command to the attachment and do what it wants. Never raises."""
        try:
            effects = self.attachment.handle(boot_ms(), command)
            self._live_epoch = self.attachment.live_epoch or NO_EPOCH
            self._live_source = None
            for effect in effects:
                self._do(effect)
        except Exception:
            _log.exception(
                "an attachment stumbled over an error of this process", extra=fields(do=BUG)
            )
        deadline = self.attachment.next_deadline()
        if deadline is not None:
            self._around.wheel.schedule(self, deadline)

    def on_deadline(self, now_ms: int) -> None:
        """See `Timed`."""
        self.handle(Tick())

    def _do(self, effect: Effect) -> None:
        match effect:
            case ResolveManager(min_epoch, trace):
                future = self._around.registry.resolve(self.user, min_epoch, trace)
                future.add_done_callback(self._on_resolved)
            case SendCommand(placement, command):
                self._around.nodes.send(placement, command)
            case HeadKnown(head):
                self.sequence = max(self.sequence, head.sequence)
                for connection in self.connections:
                    self._attach(connection, head)
            case HeadRefreshed(head):
                self.sequence = max(self.sequence, head.sequence)
                for connection in self.connections:
                    if connection.session.state is SessionState.ATTACHING:
                        self._attach(connection, head)
            case SearchFailed(reason):
                for connection in self.connections:
                    if connection.session.state is SessionState.ATTACHING:
                        connection.handle(AttachFailed(reason))
            case Settle(ticket, outcome):
                waiting = self._outcomes.pop(ticket, None)
                if waiting is not None:
                    waiting(outcome)
            case EndClient(client_id):
                for connection in self.connections:
                    if connection.client_id == client_id:
                        connection.handle(End(Reason.CONNECTION_REPLACED))
            case EndSessions(reason):
                for connection in self.connections:
                    connection.handle(End(reason))
            case Over():
                self._outcomes.clear()
                self._around.over(self)

    def _on_resolved(self, future: "asyncio.Future[Placement]") -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self.handle(Resolved(future.result()))
        elif isinstance(error, StewardError):
            self.handle(ResolveFailed(error.reason, error.retry_after_ms or 0))
        else:
            self.handle(ResolveFailed(Reason.INTERNAL))

    def _attach(self, connection: Connection, head: StreamHead) -> None:
        first = connection.session.state is SessionState.ATTACHING
        connection.handle(StreamAttached(head))
        if first:
            self._around.attached(connection)
            self._around.spans.attached(connection, connection.session, head.epoch)

    def _vacate(self) -> None:
        if not self.connections and not self._visitors:
            self.handle(Vacated())

    # ---- Owner

    def submit(self, connection: Connection, ref: str, command: UserCommand) -> None:
        began = time.perf_counter()
        trace = ""

        def settled(outcome: CommandOutcome) -> None:
            if isinstance(outcome, Accepted) and not (outcome.duplicate or outcome.queue_position):
                self._around.times.accepted(self, outcome.sequence, began, trace)
            connection.handle(CommandSettled(ref, outcome))

        said = command.trace if isinstance(command, SubmitMessage) else ""
        trace = self.command(Arrival.of(said), command, settled, connection)

    def trimmed(self, stream_id: StreamId, oldest: int) -> None:
        """See `Reader` of the replays."""
        self.handle(Trimmed(stream_id, oldest))

    def replayed(self, connection: Connection, events: Sequence[bytes]) -> None:
        """See `Reader` of the replays."""
        self._around.spans.replayed(connection, events)

    def read_page(self, connection: Connection, page: ReadPage) -> None:
        self._around.read_page(self, connection, page)

    def check_token(self, connection: Connection, token: str) -> None:
        self._around.check_token(connection, token)

    def received(self) -> None:
        self._around.received()

    def refused(self, reason: str) -> None:
        self._around.refused(reason)

    def gap(self, connection: Connection, batch: EventBatch) -> None:
        attachment = self.attachment
        text = f"event {batch.first} came when {connection.session.next} was the next"
        self._around.report(
            ViolationKind.DELIVERY_GAP,
            text,
            self.user,
            attachment.live_epoch,
            attachment.live_node,
        )

    def report(self, kind: ViolationKind, evidence: str, lost: int) -> None:
        self._around.events_lost(lost)
        self._around.report(kind, evidence, self.user, self.attachment.max_epoch)

    def acknowledged(self, connection: Connection, sequence: int) -> None:
        self._around.times.acknowledged(connection, sequence)
        self._around.spans.acknowledged(connection, sequence)

    def leaving(self, connection: Connection, code: int) -> None:
        self.connections = tuple(c for c in self.connections if c is not connection)
        client_id = connection.client_id
        if client_id and all(other.client_id != client_id for other in self.connections):
            self.handle(ClientLeft(client_id))
        self._around.leaving(connection, code)
        self._vacate()

    def lost(self, connection: Connection) -> None:
        self._around.lost(connection)


def _both(first: Outcome, second: Outcome) -> Outcome:
    def settled(outcome: CommandOutcome) -> None:
        first(outcome)
        second(outcome)

    return settled
