"""How long events are under way, measured so that nobody who waits for them notices.

Three questions, each answered once per batch or by a bounded sample, never per event:
append to socket (the node says when the oldest event of a batch became durable; asked when
the batch is written), append to `ack` (of one connection per batch, of those that send acks at
all), message to first event (of some messages that start a run at once; looked at once per batch).

Times of the node are of its wall clock: between machines they are as good as their clocks, and what
would be negative counts as 0. A trace that is sampled becomes the exemplar of what it was seen in.
"""

import time
from typing import Protocol

from steward.telemetry.catalog import EdgeMetrics
from steward.telemetry.instruments import exemplar_of

MOST_AWAITED = 64
"""Messages whose first event is waited for; others are not measured."""

MOST_WATCHED = 256
"""Connections whose next ack is waited for; the oldest give way."""


class Stream(Protocol):
    """What has seen a user's events up to `sequence`."""

    @property
    def sequence(self) -> int: ...


class DeliveryTimes:
    """The measures of one edge. One event loop; nothing here raises or waits."""

    __slots__ = (
        "_awaited",
        "_first_event",
        "_oldest_us",
        "_to_ack",
        "_to_socket",
        "_traceparent",
        "_watched",
    )

    def __init__(self, metrics: EdgeMetrics) -> None:
        self._to_socket = metrics.append_to_socket_seconds
        self._to_ack = metrics.append_to_ack_seconds
        self._first_event = metrics.first_event_seconds
        self._oldest_us = 0
        self._traceparent = ""
        # Stream → the first event that counts, when the message came, its trace.
        self._awaited: dict[Stream, tuple[int, float, str]] = {}
        # Connection → the event to be acknowledged, when it became durable, its trace.
        self._watched: dict[object, tuple[int, int, str]] = {}

    # ---- a batch of deliveries

    def batch_came(self, oldest_us: int) -> None:
        """A batch is about to be delivered; its oldest event is durable since then (0: unknown)."""
        if oldest_us and not self._oldest_us:
            self._oldest_us = oldest_us

    def sampled(self, traceparent: str) -> None:
        """The batch has an event of this trace, which is sampled."""
        self._traceparent = traceparent

    def batch_out(self, connection: object | None, sequence: int) -> None:
        """It was handed on, its last delivery up to `sequence` to this connection.

        `connection` is None when nobody was there, or nobody who sends acks.
        """
        if self._awaited:
            self._find_first_events()
        if connection is not None and self._oldest_us and connection not in self._watched:
            if len(self._watched) >= MOST_WATCHED:
                del self._watched[next(iter(self._watched))]
            self._watched[connection] = (sequence, self._oldest_us, self._traceparent)

    def written(self) -> None:
        """All of it is in the sockets, as far as they took it."""
        if self._oldest_us:
            self._to_socket.observe(_since(self._oldest_us), exemplar_of(self._traceparent))
            self._oldest_us = 0
        self._traceparent = ""

    # ---- acks

    def acknowledged(self, connection: object, sequence: int) -> None:
        """This client has all events up to `sequence`."""
        watched = self._watched.get(connection)
        if watched is not None and sequence >= watched[0]:
            del self._watched[connection]
            self._to_ack.observe(_since(watched[1]), exemplar_of(watched[2]))

    def lost(self, connection: object) -> None:
        """Nothing more comes of it."""
        self._watched.pop(connection, None)

    # ---- first events

    def accepted(self, stream: Stream, sequence: int, began: float, traceparent: str = "") -> None:
        """A message that came at `began` (perf_counter) is event `sequence`, and its run begins."""
        if stream in self._awaited or len(self._awaited) >= MOST_AWAITED:
            return
        self._awaited[stream] = (sequence + 1, began, traceparent)
        self._find_first_events()

    def _find_first_events(self) -> None:
        found = [stream for stream, (at, _, _) in self._awaited.items() if stream.sequence >= at]
        now = time.perf_counter()
        for stream in found:
            _, began, traceparent = self._awaited.pop(stream)
            self._first_event.observe(now - began, exemplar_of(traceparent))

    def over(self, stream: Stream) -> None:
        """Nobody of this user is here any more."""
        self._awaited.pop(stream, None)


def _since(wall_us: int) -> float:
    """Seconds since then; 0 for what another machine's clock puts into the future."""
    return max(time.time_ns() // 1000 - wall_us, 0) / 1e6
