"""`Backlog`: what waits for a client that reads too slowly, adjacent deltas of a message merged.

For clients that asked for it (`merge=1`) and are behind; a client that keeps up has no
backlog. It guarantees: everything comes out in the order in which it went in, each event
once; two `agent_text` become one only if nothing lies between them and they are equal in
all but `sequence`, `event_id`, `time` and the delta, so never across messages, runs, epochs
or traces; a merged event is at most `most_bytes` long; what was not merged stays byte for
byte what it was. It does not bound itself: its owner looks at `size`.

A merged event has the deltas joined, `from_sequence` of the first, all else of the last.
"""

from collections import deque
from typing import Any, Final

import orjson

from edge.core.batch import EventBatch

MOST_MERGED_BYTES: Final = 64 * 1024
"""A longer merged event would only come later: a client sees an event when it has all of it."""

# An event begins with its type. What begins otherwise is not merged, which is never wrong.
_DELTA: Final = b'{"type":"agent_text"'
# Room for `from_sequence` and for numbers of the last event that are longer than the first's.
_ENVELOPE_GROWTH: Final = 96


class Backlog:
    """Events and frames in their order; the last one still grows if it is a delta."""

    __slots__ = ("_growing", "_items", "_most_bytes", "_settled")

    def __init__(self, most_bytes: int) -> None:
        """No merged event is longer than `most_bytes`."""
        self._most_bytes = most_bytes
        self._items: deque[EventBatch | bytes] = deque()
        # Bytes of `_items`.
        self._settled = 0
        self._growing: _Growing | None = None

    def __bool__(self) -> bool:
        return self._growing is not None or bool(self._items)

    @property
    def size(self) -> int:
        """Bytes that wait, without the framing of events."""
        return self._settled + (self._growing.size if self._growing is not None else 0)

    def add(self, batch: EventBatch) -> None:
        """Add the events that follow next."""
        for sequence, event in enumerate(batch.events, batch.first):
            delta = _Delta.of(sequence, event)
            growing = self._growing
            if delta is None:
                self._settle()
                self._put(EventBatch(sequence, (event,)), len(event))
            elif growing is None or not growing.take(delta, self._most_bytes):
                self._settle()
                self._growing = _Growing(delta)

    def add_frame(self, data: bytes) -> None:
        """Add a frame of the edge itself, as it goes over the wire. Nothing merges across it."""
        self._settle()
        self._put(data, len(data))

    def take(self, most_bytes: int) -> list[EventBatch | bytes]:
        """Remove the oldest, up to `most_bytes`, one at least if there is one.

        A merged event is a batch of one, under its last sequence.
        """
        if not self._items or self.size <= most_bytes:
            self._settle()
        taken: list[EventBatch | bytes] = []
        room = most_bytes
        while self._items:
            item = self._items[0]
            size = len(item) if isinstance(item, bytes) else item.size
            if taken and size > room:
                break
            room -= size
            self._settled -= size
            taken.append(self._items.popleft())
        return taken

    def _put(self, item: EventBatch | bytes, size: int) -> None:
        self._items.append(item)
        self._settled += size

    def _settle(self) -> None:
        """What grows does so no more: something else follows, or it is sent."""
        growing, self._growing = self._growing, None
        if growing is not None:
            event = growing.event()
            self._put(EventBatch(growing.last, (event,)), len(event))


def merged(batch: EventBatch, most_bytes: int) -> list[EventBatch]:
    """A batch for a client that is behind: its adjacent deltas merged, the rest as it is."""
    backlog = Backlog(most_bytes)
    backlog.add(batch)
    return [item for item in backlog.take(backlog.size) if isinstance(item, EventBatch)]


class _Delta:
    """An `agent_text`, looked into: its delta, and what has to be equal to merge it."""

    __slots__ = ("delta", "event", "same", "sequence")

    def __init__(self, sequence: int, event: bytes, delta: str, same: dict[str, Any]) -> None:
        self.sequence = sequence
        self.event = event
        self.delta = delta
        self.same = same

    @classmethod
    def of(cls, sequence: int, event: bytes) -> "_Delta | None":
        """None for an event of another kind, and for one that is not what it has to be."""
        if not event.startswith(_DELTA):
            return None
        try:
            same: dict[str, Any] = orjson.loads(event)
            delta = same["data"].pop("delta")
            told = same.pop("sequence")
            del same["event_id"], same["time"]
        except (orjson.JSONDecodeError, KeyError, AttributeError, TypeError):
            return None
        if told != sequence or not isinstance(delta, str):
            return None
        return cls(sequence, event, delta, same)


class _Growing:
    """Deltas that follow each other and are one event when it is sent."""

    __slots__ = ("_deltas", "_event", "_first", "_same", "last", "size")

    def __init__(self, first: _Delta) -> None:
        self._first = self.last = first.sequence
        self._same = first.same
        self._event = first.event
        self._deltas = [first.delta]
        # Of the event as it is now, at most.
        self.size = len(first.event)

    def take(self, delta: _Delta, most_bytes: int) -> bool:
        """Merge one more, if it may be and there is room."""
        if delta.sequence != self.last + 1 or delta.same != self._same:
            return False
        size = self.size + len(orjson.dumps(delta.delta)) - 2
        if len(self._deltas) == 1:
            size += _ENVELOPE_GROWTH
        if size > most_bytes:
            return False
        self.size = size
        self.last = delta.sequence
        self._event = delta.event
        self._deltas.append(delta.delta)
        return True

    def event(self) -> bytes:
        """The text of the event. One that took no other is what it was."""
        if len(self._deltas) == 1:
            return self._event
        merged: dict[str, Any] = {}
        for name, value in orjson.loads(self._event).items():
            merged[name] = value
            if name == "sequence":
                merged["from_sequence"] = self._first
        merged["data"]["delta"] = "".join(self._deltas)
        return orjson.dumps(merged)
