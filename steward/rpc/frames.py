"""Messages on a plain TCP connection, each with its length before it, and no task in between.

For the hops that every event takes alone (docs/decisions/0007 and 0010): what is sent is in the
socket at the end of the same turn of the loop, and what comes is handed to the owner where it
was read. gRPC wakes a thread and the loop for each message, at both ends.

A frame is its length, four bytes with the highest first, and a message. With the highest bit of
the length set the message has a *tail*: the frame is then the length of the message alone, the
message, and raw bytes that belong to it. A tail is handed over where it was read, uncopied.

Guarantees: whole messages, in order; an owner that paused is given none; nothing is read ahead
but what the buffer takes. Not guaranteed: that what was sent arrived. What was sent and not
yet taken by the socket is bounded by the owner alone, who is told by `choked` and `drained`.
"""

import asyncio
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Protocol, cast

LENGTH_BYTES = 4
TAILED = 1 << 31
"""Added to the length of a frame whose message has a tail."""
BUFFER_BYTES = 64 * 1024
"""Read at once, unless told otherwise. Longer messages get a buffer of their own for their time."""

_LENGTH = Struct(">I")
_TWO_LENGTHS = Struct(">II")

OnTailed = Callable[[bytes, memoryview], None]
"""Takes a message and its tail, whose bytes are good until it returns."""


class FrameOwner(Protocol):
    """Who has a connection. Nothing here may block or raise."""

    def received(self, frame: bytes) -> None:
        """The next message."""
        ...

    def drained(self) -> None:
        """The peer reads again, after `choked`."""
        ...

    def lost(self, why: str) -> None:
        """The connection is over. Said once."""
        ...


class FrameConnection(asyncio.BufferedProtocol):
    """One connection, of either side. One event loop; no locks."""

    def __init__(
        self,
        owner: FrameOwner,
        most_bytes: int,
        *,
        most_unsent: int = 0,
        buffer_bytes: int = BUFFER_BYTES,
        on_tailed: OnTailed | None = None,
    ) -> None:
        """A message of more than `most_bytes`, with its tail, ends the connection.

        With `most_unsent` bytes that the socket does not take it is `choked`; 0: the loop's own.
        Without `on_tailed`, for which the same holds as for the owner, no tail is taken.
        """
        self._owner = owner
        self._on_tailed = on_tailed
        self._most_unsent = most_unsent
        self.most_bytes = most_bytes
        """May be changed at any time, as by an owner who has seen whom it talks to."""
        self._transport: asyncio.Transport | None = None
        # Read into by the loop, up to `_end`; handed over up to `_begin`. What lies between is
        # the beginning of a message, or all there is while paused.
        self._buffer = self._view = memoryview(bytearray(buffer_bytes))
        self._begin = self._end = 0
        self._paused = False
        self._why = ""
        self.choked = False
        """Whether more is waiting for the peer than should."""

    def start(self, preface: bytes) -> None:
        """Say what kind of connection this is, before the first message."""
        if self._transport is not None:
            self._transport.write(preface)

    def send(self, frame: bytes, tail: Sequence[bytes] = ()) -> None:
        """Send one message, whole or (on a connection that is over) not at all. Never waits."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if tail:
            size = len(frame)
            whole = LENGTH_BYTES + size + sum(map(len, tail))
            head = _TWO_LENGTHS.pack(TAILED | whole, size)
            transport.write(b"".join((head, frame, *tail)))
        else:
            transport.write(_LENGTH.pack(len(frame)) + frame)

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self) -> None:
        """Give the owner nothing more, and read nothing more. Safe to call twice."""
        if not self._paused:
            self._paused = True
            if self._transport is not None:
                self._transport.pause_reading()

    def resume(self) -> None:
        """Go on after `pause`: first with what was read before it. Safe to call twice."""
        if self._paused:
            self._paused = False
            self._cut()
            if not self._paused and self._transport is not None:
                self._transport.resume_reading()

    def close(self) -> None:
        """End it after what was sent. Safe to call twice."""
        if self._transport is not None:
            self._transport.close()

    def abort(self, why: str) -> None:
        """End it now, and tell the owner `why`. Safe to call twice."""
        self._why = self._why or why
        if self._transport is not None:
            self._transport.abort()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._most_unsent:
            self._transport.set_write_buffer_limits(self._most_unsent)

    def get_buffer(self, sizehint: int) -> memoryview:
        self._make_room()
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        self._end += nbytes
        if not self._paused:
            self._cut()

    def data_received(self, data: bytes) -> None:
        """The same for bytes that somebody else has read."""
        while data:
            room = self.get_buffer(len(data))
            size = min(len(room), len(data))
            room[:size] = data[:size]
            data = data[size:]
            self.buffer_updated(size)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._view = self._buffer
        self._begin = self._end = 0
        self._owner.lost(self._why or (str(exc) if exc else "the peer ended the connection"))

    def pause_writing(self) -> None:
        self.choked = True

    def resume_writing(self) -> None:
        self.choked = False
        self._owner.drained()

    def _make_room(self) -> None:
        """Leave room behind `_end`: for the rest of the message that has begun, if one has."""
        begin, rest = self._begin, self._end - self._begin
        if not rest:
            self._view = self._buffer
            self._begin = self._end = 0
            return
        room = len(self._view)
        whole = rest + 1
        if rest >= LENGTH_BYTES:
            (word,) = _LENGTH.unpack_from(self._view, begin)
            whole = max(whole, LENGTH_BYTES + min(word & ~TAILED, self.most_bytes))
        if begin + whole <= room and (not begin or room - self._end >= room // 4):
            return
        if whole > room:
            view = memoryview(bytearray(max(whole, 2 * room) if rest == room else whole))
        else:
            view = self._view
        view[:rest] = self._view[begin : self._end]
        self._view, self._begin, self._end = view, 0, rest

    def _cut(self) -> None:
        """Hand over the messages that are whole."""
        while not self._paused and self._end - self._begin >= LENGTH_BYTES:
            if self._transport is None or self._transport.is_closing():
                # What the owner did ended it, or it ended while it was paused.
                self._begin = self._end
                return
            view, at = self._view, self._begin + LENGTH_BYTES
            (word,) = _LENGTH.unpack_from(view, self._begin)
            tailed = word >= TAILED and self._on_tailed is not None
            size = word - TAILED if tailed else word
            if size > self.most_bytes or (tailed and size < LENGTH_BYTES):
                self._begin = self._end
                self.abort(f"a message of {size} bytes; at most {self.most_bytes} are taken")
                return
            end = at + size
            if end > self._end:
                return
            self._begin = end
            if tailed:
                self._hand_over_tailed(view[at:end])
            else:
                self._owner.received(bytes(view[at:end]))

    def _hand_over_tailed(self, body: memoryview) -> None:
        (size,) = _LENGTH.unpack_from(body)
        end = LENGTH_BYTES + size
        if end > len(body):
            self.abort(f"a message of {size} bytes in a frame of {len(body)}")
        elif self._on_tailed is not None:
            self._on_tailed(bytes(body[LENGTH_BYTES:end]), body[end:])
