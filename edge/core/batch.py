"""Consecutive events of one user, and the bytes that carry them on a wire, made once.

All connections of a user share one `EventBatch`: the framed bytes are built at the first
use and written as they are to every socket.
"""

from collections.abc import Sequence

from edge.core.frames import encode_text
from steward.model.keys import StreamId


class EventBatch:
    """Events `first` to `last` without a hole; each is the exact text of one message."""

    __slots__ = ("_frames", "_text", "events", "first", "last")

    def __init__(self, first: int, events: Sequence[bytes]) -> None:
        """`events` is not empty."""
        self.first = first
        self.last = first + len(events) - 1
        self.events = events
        self._frames: bytes | None = None
        self._text: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes of the events."""
        return sum(map(len, self.events))

    def frames(self) -> bytes:
        """The events as WebSocket text frames, joined."""
        frames = self._frames
        if frames is None:
            events = self.events
            if len(events) == 1:
                frames = encode_text(events[0])
            else:
                frames = b"".join(map(encode_text, events))
            self._frames = frames
        return frames

    def text(self, stream_id: StreamId) -> bytes:
        """The events as Server-Sent Events: `id: <stream_id>:<sequence>` and `data:`."""
        if self._text is None:
            name = stream_id.encode()
            self._text = b"".join(
                b"id: %b:%d\ndata: %b\n\n" % (name, sequence, event)
                for sequence, event in enumerate(self.events, self.first)
            )
        return self._text

    def tail(self, first: int) -> "EventBatch":
        """The part from `first` on, which lies within."""
        if first <= self.first:
            return self
        return EventBatch(first, self.events[first - self.first :])
