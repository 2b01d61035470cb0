"""Messages on a plain TCP connection, each with its length before it, and no task in between.

For the one hop that every event takes alone (docs/decisions/0007): what is sent is in the
socket at the end of the same turn of the loop, and what comes is handed to the owner where it
was read. gRPC wakes a thread and the loop for each message, at both ends.

Guarantees: whole messages, in order; an owner that paused is given none; nothing is read ahead
but what one read brought. Not guaranteed: that what was sent arrived. What was sent and not
yet taken by the socket is bounded by the owner alone, who is told by `choked` and `drained`.
"""

import asyncio
from typing import Protocol, cast

LENGTH_BYTES = 4


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


class FrameConnection(asyncio.Protocol):
    """One connection, of either side. One event loop; no locks."""

    def __init__(self, owner: FrameOwner, most_bytes: int) -> None:
        """A message of more than `most_bytes` ends the connection."""
        self._owner = owner
        self.most_bytes = most_bytes
        """May be changed at any time, as by an owner who has seen whom it talks to."""
        self._transport: asyncio.Transport | None = None
        # What is left of the last reads: the beginning of a message, or all while paused.
        self._rest = bytearray()
        self._paused = False
        self._why = ""
        self.choked = False
        """Whether more is waiting for the peer than should."""

    def start(self, preface: bytes) -> None:
        """Say what kind of connection this is, before the first message."""
        if self._transport is not None:
            self._transport.write(preface)

    def send(self, frame: bytes) -> None:
        """Send one message, whole or (on a connection that is over) not at all. Never waits."""
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(len(frame).to_bytes(LENGTH_BYTES, "big") + frame)

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
            self._cut_rest()
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

    def data_received(self, data: bytes) -> None:
        if self._rest or self._paused:
            self._rest += data
            self._cut_rest()
            return
        at = self._cut(data)
        if at < len(data):
            self._rest += data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._rest.clear()
        self._owner.lost(self._why or (str(exc) if exc else "the peer ended the connection"))

    def pause_writing(self) -> None:
        self.choked = True

    def resume_writing(self) -> None:
        self.choked = False
        self._owner.drained()

    def _cut_rest(self) -> None:
        # A long message comes in many reads: it is put together once, when all of it is here.
        # One that is too long never is: `_cut` ends the connection by its length alone.
        if len(self._rest) < LENGTH_BYTES:
            return
        size = int.from_bytes(self._rest[:LENGTH_BYTES], "big")
        if size <= self.most_bytes and len(self._rest) < LENGTH_BYTES + size:
            return
        data = bytes(self._rest)
        self._rest.clear()
        at = self._cut(data)
        # What the owner did may have ended the connection.
        if self._transport is not None and at < len(data):
            self._rest += data[at:]

    def _cut(self, data: bytes) -> int:
        """Hand over the messages that are whole; how far they went."""
        at, end = 0, len(data)
        if self._transport is None or self._transport.is_closing():
            # Ended while it was paused.
            return end
        while not self._paused and end - at >= LENGTH_BYTES:
            begin = at + LENGTH_BYTES
            size = int.from_bytes(data[at:begin], "big")
            if size > self.most_bytes:
                self.abort(f"a message of {size} bytes; at most {self.most_bytes} are taken")
                return end
            if end - begin < size:
                break
            at = begin + size
            self._owner.received(data[begin:at])
            if self._transport is None or self._transport.is_closing():
                return end
        return at
