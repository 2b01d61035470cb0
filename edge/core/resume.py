"""Where a connection begins in its user's stream: the resume table of the wire protocol.

Pure. A client names what it has (`after`, and the `stream` it belongs to); the head of the
stream decides between `new`, `resumed` and `reset`. Nothing is skipped silently: what can't
be continued exactly is a reset.
"""

from dataclasses import dataclass
from enum import StrEnum

from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, NodeId, StreamId

MAX_ID_CHARACTERS = 128
MAX_SEQUENCE = (1 << 53) - 1


class Resume(StrEnum):
    """How a connection continues: the `resume` of `ready`."""

    NEW = "new"
    RESUMED = "resumed"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What the client has: events up to `after` of `stream`. None: it did not say."""

    after: int | None = None
    stream: StreamId | None = None


@dataclass(frozen=True, slots=True)
class StreamHead:
    """The stream as an attach found it, and the manager that feeds it.

    Live events follow from `sequence + 1`; `oldest` is the first that is still kept.
    """

    stream_id: StreamId
    sequence: int
    oldest: int
    node_id: NodeId
    epoch: Epoch


def is_id(value: object) -> bool:
    """Whether `value` is an id of the wire protocol: 1 to 128 printable characters."""
    return isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARACTERS and value.isprintable()


def parse_resume(after: str | None, stream: str | None) -> ResumePoint:
    """The point named by a query. Raises StewardError(PROTOCOL_VIOLATION)."""
    if stream is not None and not is_id(stream):
        raise StewardError(Reason.PROTOCOL_VIOLATION, "stream is not an id; send what ready said")
    position = None if after is None else _sequence(after)
    return ResumePoint(position, None if stream is None else StreamId(stream))


def parse_merge(merge: str | None) -> bool:
    """Whether a query asks for merged deltas. Raises StewardError(PROTOCOL_VIOLATION)."""
    if merge not in (None, "0", "1"):
        raise StewardError(Reason.PROTOCOL_VIOLATION, "merge is 1 or 0")
    return merge == "1"


def parse_last_event_id(text: str) -> ResumePoint:
    """The point named by `Last-Event-ID: <stream_id>:<sequence>`. Raises StewardError."""
    stream, colon, sequence = text.rpartition(":")
    if not colon:
        raise StewardError(Reason.PROTOCOL_VIOLATION, "Last-Event-ID is not <stream_id>:<sequence>")
    return parse_resume(sequence, stream)


def _sequence(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and int(text) <= MAX_SEQUENCE):
        raise StewardError(Reason.PROTOCOL_VIOLATION, "after is not a sequence; send a number")
    return int(text)


def is_ahead(point: ResumePoint, head: StreamHead) -> bool:
    """Whether the client claims more of this very stream than `head` has."""
    same = point.stream is None or point.stream == head.stream_id
    return point.after is not None and same and point.after > head.sequence


def decide_resume(point: ResumePoint, head: StreamHead) -> tuple[Resume, int]:
    """How to go on, and the sequence of the first event to send."""
    oldest = max(head.oldest, 1)
    if point.after is None:
        return Resume.NEW, head.sequence + 1
    elsewhere = point.stream is not None and point.stream != head.stream_id
    if elsewhere or point.after > head.sequence or point.after + 1 < oldest:
        return Resume.RESET, oldest
    return Resume.RESUMED, point.after + 1
