"""`MergingConnection`: a WebSocket that asked for merged deltas (`merge=1`) and may fall behind.

As long as its socket takes everything it is a `WebSocketConnection` like any other. When the
socket is full, what comes waits in a `Backlog`, deltas merged, and goes out in pieces as the
peer reads. Unsent bytes are bounded as for everybody, those of the backlog included: over
the bound is SLOW_CONSUMER. A connection that ends drops what waits: it is in the log, and
the client resumes before it.

A replay is merged from where it first filled the socket to its end: the peer reads slower than
the log, or is as far behind as if it did. Connections without `merge=1` are of another class
and pay nothing for this one.
"""

import asyncio
import contextlib
import socket
from typing import Final, cast

from edge.core.backlog import MOST_MERGED_BYTES, Backlog, merged
from edge.core.batch import EventBatch
from edge.core.session import EdgeSession, SessionState
from edge.core.session_values import Command, End
from edge.host.connection import Owner, WebSocketConnection
from edge.host.flush import Flusher
from edge.host.wheel import TimerWheel
from steward.errors import Reason
from steward.runtime.clock import boot_ms

LOW_MARK_BYTES: Final = 16 * 1024
"""Unsent bytes over this mean behind. The kernel is asked to keep no more unsent either, where it
can be: else megabytes of old news would lie there before anything merges."""

PIECE_BYTES: Final = 64 * 1024
"""Taken from the backlog at a time: what is taken grows no more."""

_NOTSENT_LOWAT: Final[int | None] = getattr(socket, "TCP_NOTSENT_LOWAT", None)


class MergingConnection(WebSocketConnection):
    """There is a backlog as long as the client is behind; all that it is sent goes through it."""

    __slots__ = ("_backlog", "_late", "_most_merged")

    def __init__(
        self,
        owner: Owner,
        session: EdgeSession,
        flusher: Flusher,
        wheel: TimerWheel,
        write_limit: int,
        client_id: str,
        max_message_bytes: int,
    ) -> None:
        super().__init__(owner, session, flusher, wheel, write_limit, client_id, max_message_bytes)
        self._most_merged = min(max_message_bytes, MOST_MERGED_BYTES)
        self._backlog: Backlog | None = None
        # A page of the replay had to wait for room in the socket.
        self._late = False

    # ---- what goes out

    def deliver(self, batch: EventBatch) -> bool:
        if self._backlog is not None and self.session.offer(batch):
            self.send_events(batch)
            return True
        return super().deliver(batch)

    def take(self, now_ms: int, first: int, following: int, frames: bytes) -> bool:
        return self._backlog is None and super().take(now_ms, first, following, frames)

    def send_events(self, batch: EventBatch) -> None:
        if self._backlog is not None:
            self._backlog.add(batch)
            self._mark()
        elif self._late:
            self._pending.extend(map(self.encode_batch, merged(batch, self._most_merged)))
            self._mark()
        else:
            super().send_events(batch)

    def write(self, data: bytes) -> None:
        if self._backlog is not None and not self.session.closing:
            self._backlog.add_frame(data)
            self._mark()
        else:
            self._backlog = None
            super().write(data)

    def flush(self, now_ms: int) -> None:
        super().flush(now_ms)
        if self._backlog is not None:
            self._catch_up(now_ms)

    def _catch_up(self, now_ms: int) -> None:
        """Write what waits for as long as the socket takes it; bound what it does not take."""
        while not self._paused and (backlog := self._backlog):
            for item in backlog.take(PIECE_BYTES):
                self._pending.append(item if isinstance(item, bytes) else self.encode_batch(item))
            super().flush(now_ms)
        if not self._paused:
            self._backlog = None
        elif self._backlog and self.transport is not None:
            unsent = self.transport.get_write_buffer_size() + self._backlog.size
            if unsent > self._write_limit:
                self.handle(End(Reason.SLOW_CONSUMER))

    # ---- what comes in

    def handle(self, command: Command) -> None:
        super().handle(command)
        if self._late and self.session.state is not SessionState.CATCHING_UP:
            self._late = False

    def _read_on(self) -> None:
        # What waits goes first: the page of a replay would only wait behind it.
        if not self._backlog:
            super()._read_on()

    # ---- the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        cast(asyncio.WriteTransport, transport).set_write_buffer_limits(high=LOW_MARK_BYTES)
        peer = transport.get_extra_info("socket")
        if peer is not None and _NOTSENT_LOWAT is not None:
            # What is no TCP socket does without.
            with contextlib.suppress(OSError):
                peer.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, LOW_MARK_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        self._backlog = None
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._backlog is None:
            self._backlog = Backlog(self._most_merged)

    def resume_writing(self) -> None:
        self._paused = False
        self._late = self._late or self._page is not None
        self.flush(boot_ms())
