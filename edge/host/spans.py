"""Spans of an edge: who came, what was sent, what was shown to whom, and what the client has seen.

A connection is not one long span. `edge.connect` ends when events flow; each message is a trace
of its own, linked with it. An event that is sampled is announced by its node, so no event is
opened here: what is delivered to each connection, and what it acknowledges, is recorded for
announced ones alone. Nothing here waits, raises, or keeps more than a bounded number of spans.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from edge.core.commands import CommandOutcome, Refused, UserCommand
from edge.core.resume import Resume
from steward.errors import ERRORS
from steward.telemetry import conventions as names
from steward.telemetry.tracing import (
    Attribute,
    Kind,
    Link,
    Tracing,
    is_sampled,
    is_traceparent,
    new_traceparent,
    trace_of,
)

MOST_ANNOUNCED = 1_000
"""Sampled events of one user that are announced and not delivered yet."""
MOST_UNACKNOWLEDGED = 256
"""Deliveries of one connection whose acknowledgement is waited for."""
MOST_LINKS = 16
_FAULTS = frozenset(row.close_code for row in ERRORS.values() if row.is_fault and row.close_code)


@dataclass(slots=True)
class Arrival:
    """A request or a connection, from its first byte on. `parent`: what the client says."""

    parent: str = ""
    context: str = ""
    start_ns: int = 0

    @classmethod
    def of(cls, header: str) -> "Arrival":
        """With the value of a `traceparent` header; one that is none counts as absent."""
        return cls(header if is_traceparent(header) else "")


class Session(Protocol):
    """What is asked of the session of a connection."""

    @property
    def next(self) -> int: ...

    @property
    def resume(self) -> Resume | None: ...

    @property
    def connection_id(self) -> str: ...


class Connected(Protocol):
    """A connection, as far as spans go."""

    @property
    def session(self) -> Session: ...


class _Delivered(NamedTuple):
    """An event that a connection was given."""

    sequence: int
    context: str
    at_ns: int


class EdgeSpans:
    """The open spans of one edge."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self.enabled = tracing.enabled
        # Of connections, until they are lost; the start is 0 once they are attached.
        self._arrivals: dict[object, Arrival] = {}
        self._resumed: set[object] = set()
        self._unacknowledged: dict[object, deque[_Delivered]] = {}

    # ---- who comes

    def arrive(self, arrival: Arrival) -> str:
        """Somebody is here. The context of all that this causes; empty when traces are off."""
        if self.enabled:
            parent = arrival.parent
            arrival.start_ns = time.time_ns()
            arrival.context = self._tracing.child(parent) if parent else self._tracing.new_root()
        return arrival.context

    def asked(self, arrival: Arrival) -> str:
        """The same as told to another service: empty unless it is sampled."""
        return arrival.context if is_sampled(arrival.context) else ""

    def joined(self, connection: object, arrival: Arrival) -> str:
        """A connection was taken. The context of finding its manager; empty when not sampled."""
        if not self.enabled:
            return ""
        if not arrival.context:
            self.arrive(arrival)
        self._arrivals[connection] = arrival
        return self.asked(arrival)

    def trace_of(self, connection: object) -> str:
        """The context of the arrival of this connection; empty when traces are off."""
        arrival = self._arrivals.get(connection)
        return arrival.context if arrival is not None else ""

    def attached(self, connection: object, session: Session, epoch: int) -> None:
        """Events begin to flow to it."""
        arrival, resume = self._arrivals.get(connection), session.resume
        if arrival is not None and arrival.start_ns and resume is not None:
            attributes: dict[str, Attribute] = {
                names.RESUME: resume.value,
                names.EPOCH: epoch,
                names.CONNECTION_ID: session.connection_id,
            }
            self._end(names.EDGE_CONNECT, arrival, attributes, kind=Kind.SERVER)
            arrival.start_ns = 0
            if resume is Resume.RESUMED:
                self._resumed.add(connection)

    def replayed(self, connection: object, events: Iterable[bytes]) -> None:
        """The first stored events of a connection that resumes: joined with their traces."""
        if connection not in self._resumed:
            return
        self._resumed.discard(connection)
        traces = {trace: None for event in events if is_sampled(trace := trace_of(event))}
        links = [Link(t, {names.LINK: names.RESUMED}) for t in list(traces)[:MOST_LINKS]]
        arrival = self._arrivals.get(connection)
        if arrival is not None:
            self._tracing.record(
                names.EDGE_RESUME,
                arrival.context,
                time.time_ns(),
                {},
                links=links,
                upgraded=bool(links),
            )

    def leaving(self, connection: object, code: int) -> None:
        """It gets no more events. One that never got any by a fault of the cluster is recorded."""
        if not self.enabled:
            return
        arrival = self._arrivals.pop(connection, None)
        self._resumed.discard(connection)
        self._unacknowledged.pop(connection, None)
        if arrival is not None and arrival.start_ns:
            fault = code in _FAULTS
            attributes: dict[str, Attribute] = {names.CLOSE_CODE: code}
            self._end(names.EDGE_CONNECT, arrival, attributes, kind=Kind.SERVER, failed=fault)

    def again(self, connections: Iterable[object], cause: str) -> str:
        """The manager of these is looked for once more. Always recorded after a failover.

        The context of the search, which is joined with how they came; empty when not kept.
        """
        if not self.enabled:
            return ""
        links = [
            Link(arrival.context, {names.LINK: cause})
            for connection in connections
            if (arrival := self._arrivals.get(connection)) is not None
            and is_sampled(arrival.context)
        ][:MOST_LINKS]
        kept = cause == names.FAILOVER or bool(links)
        context = self._tracing.record(
            names.EDGE_REATTACH,
            "",
            time.time_ns(),
            {names.CAUSE: cause},
            context=self._tracing.new_root(),
            links=links,
            upgraded=kept,
        )
        return context if is_sampled(context) else ""

    # ---- what is sent

    def receive(
        self, connection: object, arrival: Arrival, body: UserCommand
    ) -> tuple[str, Callable[[CommandOutcome], None] | None]:
        """A command came in. Its context, and whom to tell the outcome, if anybody.

        The context is never empty, since every event names its trace.
        """
        if not self.enabled:
            return arrival.parent or new_traceparent(sampled=False), None
        context = arrival.context or self.arrive(arrival)
        came = self._arrivals.get(connection)
        links: list[Link] = []
        if came is not None and is_sampled(came.context):
            links.append(Link(came.context, {names.LINK: names.ATTACH}))
        attributes: dict[str, Attribute] = {names.COMMAND: type(body).__name__}

        def answered(outcome: CommandOutcome) -> None:
            failed = False
            if isinstance(outcome, Refused):
                attributes[names.REASON] = outcome.reason.value
                failed = ERRORS[outcome.reason].is_fault
            self._end(
                names.EDGE_RECEIVE,
                arrival,
                attributes,
                kind=Kind.SERVER,
                failed=failed,
                links=links,
            )

        return context, answered

    # ---- what is shown

    def announced(
        self, traces: "OrderedDict[int, str] | None", sequence: int, traceparent: str
    ) -> "OrderedDict[int, str] | None":
        """With one more event of a user that is sampled, by its sequence."""
        if not self.enabled or not (is_traceparent(traceparent) and is_sampled(traceparent)):
            return traces
        if traces is None:
            traces = OrderedDict()
        traces[sequence] = traceparent
        if len(traces) > MOST_ANNOUNCED:
            traces.popitem(last=False)
        return traces

    def delivered(
        self,
        traces: "OrderedDict[int, str]",
        connections: Iterable[Connected],
        first: int,
        following: int,
        epoch: int,
        began_ns: int,
    ) -> "OrderedDict[int, str] | None":
        """Events `first` to `following - 1` were handed out. What is announced beyond them."""
        for sequence in [number for number in traces if number < following]:
            trace = traces.pop(sequence)
            if sequence >= first:
                for connection in connections:
                    if connection.session.next > sequence:
                        self._deliver(connection, sequence, trace, epoch, began_ns)
        return traces or None

    def _deliver(
        self, connection: Connected, sequence: int, trace: str, epoch: int, began_ns: int
    ) -> None:
        attributes: dict[str, Attribute] = {
            names.SEQUENCE: sequence,
            names.EPOCH: epoch,
            names.CONNECTION_ID: connection.session.connection_id,
        }
        context = self._tracing.record(
            names.EDGE_DELIVER, trace, began_ns, attributes, kind=Kind.CONSUMER
        )
        waiting = self._unacknowledged.setdefault(connection, deque(maxlen=MOST_UNACKNOWLEDGED))
        waiting.append(_Delivered(sequence, context, time.time_ns()))

    def acknowledged(self, connection: object, sequence: int) -> None:
        """The client has all events up to this one: their traces end on its screen."""
        if not self._unacknowledged:
            return
        waiting = self._unacknowledged.get(connection)
        while waiting and waiting[0].sequence <= sequence:
            delivered = waiting.popleft()
            attributes = {names.SEQUENCE: delivered.sequence}
            self._tracing.record(
                names.EDGE_ACKNOWLEDGE, delivered.context, delivered.at_ns, attributes
            )

    def _end(
        self,
        name: str,
        arrival: Arrival,
        attributes: dict[str, Attribute],
        *,
        kind: Kind,
        failed: bool = False,
        links: Iterable[Link] = (),
    ) -> None:
        # Of a trace that is not sampled the context is the parent's own.
        context = arrival.context if arrival.context != arrival.parent else ""
        self._tracing.record(
            name,
            arrival.parent,
            arrival.start_ns,
            attributes,
            context=context,
            kind=kind,
            failed=failed,
            links=tuple(links),
            upgraded=failed,
        )
