"""The rules of the event log that every engine shares: what may be written, and how pages are cut.

Pure. An append or seal that breaks `check_append` or `check_seal` comes from a broken
caller: it raises ValueError before it reaches an engine, so that nothing a node sends
can fail a group commit and with it the appends of other users. What these checks do
not look at: whether the payload is an event, or a record's value is JSON (except that
of THREAD records, which are listed by their sequence).
"""

import base64
import binascii
from collections.abc import Iterable, Sequence

import orjson

from agent_service.core.journal import Append, RecordKind, Seal
from agent_service.log.port import EventPage, ReadRange, ThreadSummary
from steward.errors import Reason, StewardError
from steward.model.census import MOST_FENCES
from steward.model.keys import StreamId, UserKey

MOST_APPEND_BYTES = 8 * 1024 * 1024
"""Payload and record bytes of one append; a gRPC message carries at least one such append."""

MOST_WAITING = 65_536
"""Appends and seals that one adapter holds unanswered. A user has one in flight at most, so that
this is a bound on managers per node; beyond it `append` raises LogFull."""

MOST_PAGE_EVENTS = 1000
MOST_PAGE_BYTES = 4 * 1024 * 1024
MOST_THREADS = 200
MOST_OPEN_RUNS = 1000

_MOST_EPOCH = (1 << 53) - 1
_MOST_NUMBER = (1 << 63) - 1


def check_seal(seal: Seal) -> None:
    """Raise ValueError for a seal that no correct manager makes."""
    if not 0 < seal.epoch <= _MOST_EPOCH:
        raise ValueError(f"epoch {seal.epoch} is not in 1..2**53-1")
    if not seal.activation:
        raise ValueError("a seal needs an activation")


def check_append(append: Append) -> int:
    """The bytes that an append carries. Raises ValueError for one that no correct manager makes."""
    if not 0 < append.epoch <= _MOST_EPOCH:
        raise ValueError(f"epoch {append.epoch} is not in 1..2**53-1")
    if not 0 < append.append_number <= _MOST_NUMBER:
        raise ValueError("appends of an activation are numbered from 1")
    if not 0 < append.expected_sequence <= _MOST_NUMBER - len(append.events):
        raise ValueError("sequences are numbered from 1")
    size = carried(append)
    for record in append.records:
        if record.kind is RecordKind.THREAD and not record.deleted:
            thread_sequence(record.value)
    if size > MOST_APPEND_BYTES:
        raise ValueError(f"an append carries at most {MOST_APPEND_BYTES} bytes, this one {size}")
    return size


def carried(append: Append) -> int:
    """The bytes of its payloads and records."""
    size = 0
    for event in append.events:
        size += len(event.payload)
    for record in append.records:
        size += len(record.value)
    return size


def thread_sequence(value: bytes) -> int:
    """The sequence by which a thread is listed, from the JSON value of its record.

    Raises ValueError when the value is not a flat object with a non-negative integer `sequence`:
    engines write it again under its first title, and what is nested too deeply can't be written.
    """
    fields = orjson.loads(value)
    sequence = fields.get("sequence") if isinstance(fields, dict) else None
    if not isinstance(sequence, int) or not 0 <= sequence <= _MOST_NUMBER:
        raise ValueError("a THREAD record is a JSON object with an integer `sequence`")
    if any(isinstance(field, dict | list) for field in fields.values()):
        raise ValueError("a THREAD record is flat")
    return sequence


def has_title(value: bytes) -> bool:
    """Whether the value of a THREAD record gives the thread a title."""
    return bool(orjson.loads(value).get("title"))


def with_first_title(earlier: bytes | None, value: bytes) -> bytes:
    """The THREAD record to keep: `value`, under the title that the thread got first."""
    if earlier is None:
        return value
    title = orjson.loads(earlier).get("title")
    return orjson.dumps({**orjson.loads(value), "title": title}) if title else value


def thread_summary(thread_id: str, value: bytes) -> ThreadSummary:
    """A listed thread, from its record."""
    fields = orjson.loads(value)
    return ThreadSummary(
        thread_id=thread_id,
        title=str(fields.get("title", "")),
        sequence=fields["sequence"],
        updated_at=str(fields.get("updated_at", "")),
    )


def page_after(last: ThreadSummary) -> str:
    """The `page` that goes on after `last`: opaque to clients, safe in a URL."""
    text = orjson.dumps([last.sequence, last.thread_id])
    return base64.urlsafe_b64encode(text).decode().rstrip("=")


def parse_page(page: str) -> tuple[int, str]:
    """Sequence and id of the thread after which a listing goes on.

    Raises StewardError(PROTOCOL_VIOLATION) for text that `page_after` did not make: it comes
    back from clients.
    """
    if not page:
        return _MOST_NUMBER, ""
    try:
        decoded = orjson.loads(base64.urlsafe_b64decode(page + "=" * (-len(page) % 4)))
        sequence, thread_id = decoded
        if isinstance(thread_id, str) and type(sequence) is int and 0 <= sequence <= _MOST_NUMBER:
            return sequence, thread_id
    except (ValueError, TypeError, binascii.Error):
        pass
    raise StewardError(Reason.PROTOCOL_VIOLATION, "`page` is the `next` of an earlier listing")


def most_threads(limit: int) -> int:
    """How many threads a page holds: `limit`, within 1 and MOST_THREADS."""
    return min(max(limit, 1), MOST_THREADS)


def most_open_runs(limit: int) -> int:
    """How many users a page of open runs holds: `limit`, within 1 and MOST_OPEN_RUNS."""
    return min(max(limit, 1), MOST_OPEN_RUNS)


def check_fences_of(users: Sequence[UserKey]) -> None:
    """Raises StewardError(PROTOCOL_VIOLATION) for more users than an answer holds."""
    if len(users) > MOST_FENCES:
        raise StewardError(
            Reason.PROTOCOL_VIOLATION, f"at most {MOST_FENCES} users in one question for fences"
        )


def most_fences(limit: int) -> int:
    """How many users a page of fences holds: `limit`, within 1 and MOST_FENCES."""
    return min(max(limit, 1), MOST_FENCES)


def nobody(after: UserKey) -> StewardError:
    """The refusal of a listing that is to go on after a user whom the log never saw."""
    return StewardError(
        Reason.PROTOCOL_VIOLATION, f"no stream of {after.tenant}/{after.user}: begin anew"
    )


def bounded(wanted: ReadRange) -> ReadRange:
    """The same range with its numbers inside of what engines take."""
    return ReadRange(
        after=min(max(wanted.after, 0), _MOST_NUMBER - 1),
        until=min(wanted.until, _MOST_NUMBER) if wanted.until > 0 else _MOST_NUMBER,
        limit=min(max(wanted.limit, 1), MOST_PAGE_EVENTS),
        max_bytes=min(max(wanted.max_bytes, 1), MOST_PAGE_BYTES),
        thread_id=wanted.thread_id,
        newest=wanted.newest,
        conversation=wanted.conversation,
    )


def cut_page(
    found: Iterable[tuple[int, bytes]],
    wanted: ReadRange,
    stream_id: StreamId,
    head: int,
    oldest_sequence: int,
) -> EventPage:
    """One page of `found`, all matching (sequence, payload) in the direction of reading.

    Takes one pair more than it returns at most, so a lazy source is read no further than needed.
    """
    events: list[bytes] = []
    sequences: list[int] = []
    size = 0
    more = False
    for sequence, payload in found:
        size += len(payload)
        if events and (len(events) >= wanted.limit or size > wanted.max_bytes):
            more = True
            break
        events.append(payload)
        sequences.append(sequence)
    if wanted.newest:
        events.reverse()
        sequences.reverse()
    return EventPage(stream_id, tuple(events), tuple(sequences), head, oldest_sequence, more)
