"""Writes of one loop turn, joined: each connection is written once, however much it got.

What a node has joined already, and nothing waits before, needs none of this.

A connection that gets bytes is marked; at the end of the turn every marked connection
makes one `transport.write`. There is no writer task and no queue per connection.
"""

import asyncio
import time
from typing import Protocol

from prometheus_client import Histogram

from edge.host.timing import DeliveryTimes
from steward.runtime.clock import boot_ms


class Flushed(Protocol):
    """Something that collects bytes."""

    def flush(self, now_ms: int) -> None:
        """Write what was collected. Never raises."""
        ...


class Flusher:
    """The list of marked connections of this turn."""

    __slots__ = ("_dirty", "_loop", "_seconds", "_since", "_times")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: Histogram, times: DeliveryTimes
    ) -> None:
        """`seconds` observes the time from `begin` to the writes; `times` is told of them."""
        self._loop = loop
        self._seconds = seconds
        self._times = times
        self._dirty: list[Flushed] = []
        self._since = 0.0

    def begin(self) -> None:
        """Deliveries came off a stream: their way to the sockets is timed from here."""
        if not self._since:
            self._since = time.perf_counter()

    def end(self) -> None:
        """They are out, if nothing of them waits for the end of the turn."""
        if self._since and not self._dirty:
            self._written()

    def mark(self, connection: Flushed) -> None:
        """Flush this connection at the end of the turn. The caller marks once a turn."""
        if not self._dirty:
            self._loop.call_soon(self._flush)
        self._dirty.append(connection)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        now_ms = boot_ms()
        for connection in dirty:
            connection.flush(now_ms)
        if self._since:
            self._written()

    def _written(self) -> None:
        self._seconds.observe(time.perf_counter() - self._since)
        self._since = 0.0
        self._times.written()
