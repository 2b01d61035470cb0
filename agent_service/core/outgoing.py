"""What a manager wants stored, and what waits for it: one append in flight, one collecting.

The pipeline keeps the order that the protocol asks for: effects are released only with the
append that holds the records made before them, and the next append leaves when the one in
flight was answered. It numbers appends and events; what they say is the manager's business.
"""

from typing import NamedTuple

from agent_service.core.effects import Effect, WriteAppend
from agent_service.core.journal import Append, Record, Sealed, StoredEvent
from steward.model.keys import Epoch, Sequence, UserKey
from steward.model.verbs import EventType

FULL_APPEND_BYTES = 2 * 1024 * 1024
"""What would make an append larger waits. The log takes 8 MiB; one step adds at most 3 MiB."""


class Flight(NamedTuple):
    """The append that the log has not answered yet, and what it releases."""

    number: int
    first: Sequence
    events: tuple[StoredEvent, ...]
    effects: list[Effect]

    @property
    def last(self) -> Sequence:
        return Sequence(self.first + len(self.events) - 1)


class Outgoing:
    """The appends of one manager. `next` is the sequence of the next event, stored or not."""

    __slots__ = (
        "_after",
        "_epoch",
        "_events",
        "_number",
        "_records",
        "_size",
        "_types",
        "_user",
        "committed",
        "flight",
        "full",
        "next",
    )

    def __init__(self, user: UserKey, epoch: Epoch, sealed: Sealed) -> None:
        self._user = user
        self._epoch = epoch
        self._number = sealed.last_append_number
        self.next = sealed.next_sequence
        self.committed = Sequence(sealed.next_sequence - 1)
        self.flight: Flight | None = None
        self._events: list[StoredEvent] = []
        self._types: list[EventType] = []
        self._records: list[Record] = []
        self._after: list[Effect] = []
        self._size = 0
        self.full = False
        """Whether the collecting append should take nothing more."""

    @property
    def collected(self) -> int:
        """Events that wait for the append in flight."""
        return len(self._events)

    def event(self, event: StoredEvent, type: EventType) -> None:
        """Add the event that was encoded with the sequence `next`."""
        self.next = Sequence(self.next + 1)
        self._size += len(event.payload)
        self.full = self._size >= FULL_APPEND_BYTES
        self._events.append(event)
        self._types.append(type)

    def record(self, record: Record) -> None:
        self._size += len(record.value)
        self.full = self._size >= FULL_APPEND_BYTES
        self._records.append(record)

    def then(self, effect: Effect) -> None:
        """Release `effect` when everything before it is stored."""
        self._after.append(effect)

    def flush(self) -> list[Effect]:
        """Send what was collected, or release effects that wait for nothing."""
        if self.flight is not None:
            return []
        effects, self._after = self._after, []
        if not self._events and not self._records:
            return effects
        self._number += 1
        first = Sequence(self.committed + 1)
        events, records = tuple(self._events), tuple(self._records)
        append = Append(self._user, self._epoch, self._number, first, events, records)
        types = tuple(self._types)
        self.flight = Flight(self._number, first, events, effects)
        self._events, self._types, self._records = [], [], []
        self._size = 0
        self.full = False
        return [WriteAppend(append, types)]

    def landed(self) -> Flight:
        """The append in flight is committed: it is over, and its effects may be released."""
        flight = self.flight
        if flight is None:
            raise RuntimeError("no append is in flight")
        self.flight = None
        self.committed = flight.last
        return flight
