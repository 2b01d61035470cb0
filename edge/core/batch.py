"""Consecutive events of one user, and the bytes that carry them on a wire, made once.

All connections of a user share one `EventBatch`: the framed bytes are built at the first
use, unless the node has framed them, and written as they are to every socket. Whoever needs the
single events of framed bytes has them taken apart at the first use.
"""

from collections.abc import Sequence

from steward.model.deliveries import decode_texts, encode_texts
from steward.model.keys import StreamId


class EventBatch:
    """Events `first` to `last` without a hole; each is the exact text of one message."""

    __slots__ = ("_events", "_frames", "_text", "first", "last")

    def __init__(self, first: int, events: Sequence[bytes]) -> None:
        """`events` is not empty."""
        self.first = first
        self.last = first + len(events) - 1
        self._events: Sequence[bytes] | None = events
        self._frames: bytes | None = None
        self._text: bytes | None = None

    @classmethod
    def framed(cls, first: int, count: int, frames: bytes) -> "EventBatch":
        """`count` events as WebSocket text frames, joined."""
        batch = cls.__new__(cls)
        batch.first = first
        batch.last = first + count - 1
        batch._events = None
        batch._frames = frames
        batch._text = None
        return batch

    @property
    def events(self) -> Sequence[bytes]:
        """The texts of the events."""
        events = self._events
        if events is None:
            events = self._events = decode_texts(self.frames())
        return events

    @property
    def size(self) -> int:
        """Bytes of the events; of their frames, for as long as nobody took these apart."""
        events = self._events
        if events is None:
            return len(self.frames())
        return sum(map(len, events))

    def frames(self) -> bytes:
        """The events as WebSocket text frames, joined."""
        frames = self._frames
        if frames is None:
            frames = self._frames = encode_texts(self.events)
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
