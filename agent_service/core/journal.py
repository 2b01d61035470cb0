"""What a manager asks of the event log, as values: seals, appends, records and their outcomes.

The log checks two things only, `epoch == fence` and `expected_sequence == next`; the
manager numbers its own events. At most one append of a user is in flight.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from steward.model.keys import Epoch, Sequence, StreamId, UserKey


class RecordKind(IntEnum):
    """Kinds of keyed facts beside the events; the numbers are those of `log_service.proto`."""

    MESSAGE = 1
    RUN = 2
    THREAD = 3
    STATE = 4
    OWNER = 5
    CALL = 6
    STEP = 7


class StoredEvent(NamedTuple):
    """One event: the exact text of the WebSocket message, and the thread it is listed under.

    A tuple, as several are made per event on its way, and quickly.

    `conversation` marks those that make up a thread's history (user_message, agent_completed).
    """

    payload: bytes
    thread_id: str
    conversation: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """A keyed fact, put or deleted. `value` is JSON; it is ignored when `deleted`."""

    kind: RecordKind
    key: str
    value: bytes = b""
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Seal:
    """Raise the fence of a user to `epoch` for one manager object (`activation`, random).

    `traceparent`: of who waits for it, if that is sampled.
    """

    user: UserKey
    epoch: Epoch
    activation: str
    traceparent: str = ""


class Append(NamedTuple):
    """Events and records of one user, for one atomic write.

    `append_number` counts the appends of one activation from 1. A repeat with the
    number of the last committed append is answered as committed, and writes nothing.
    `traces`: of the events whose trace is sampled, the sequence and their context.
    """

    user: UserKey
    epoch: Epoch
    append_number: int
    expected_sequence: Sequence
    events: tuple[StoredEvent, ...]
    records: tuple[Record, ...]
    traces: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a new manager starts from: one atomic step with the raised fence.

    `records` holds all kinds but THREAD. `next_sequence` is that of the next event;
    `oldest_sequence` the first that is kept (1 for an empty stream).
    """

    stream_id: StreamId
    next_sequence: Sequence
    oldest_sequence: Sequence
    records: tuple[Record, ...]
    last_append_number: int = 0


@dataclass(frozen=True, slots=True)
class Fenced:
    """Refused: the log has seen a higher epoch (or this one under another activation)."""

    fence: Epoch


@dataclass(frozen=True, slots=True)
class Committed:
    """Durable. `next_sequence` is that of the next event."""

    next_sequence: Sequence


@dataclass(frozen=True, slots=True)
class Conflict:
    """Refused: the stream is elsewhere than expected. This manager is over."""

    next_sequence: Sequence


SealOutcome = Sealed | Fenced
AppendOutcome = Committed | Fenced | Conflict
