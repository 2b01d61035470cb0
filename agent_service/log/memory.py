"""The event log in memory: the meaning of `seal` and `append` in one page, and the engine of tests.

`LogState` is pure and synchronous; simulations drive it and take its `snapshot` as what
is durable. `MemoryLog` puts the `EventLog` port around it. Both do exactly what the
SQLite engine does, which the conformance suite checks. They guarantee nothing across
the end of the process.
"""

import asyncio
import secrets
from asyncio import Future
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from itertools import islice

from agent_service.core.journal import (
    Append,
    AppendOutcome,
    Committed,
    Conflict,
    Fenced,
    Record,
    RecordKind,
    Seal,
    Sealed,
    SealOutcome,
    StoredEvent,
)
from agent_service.log.port import (
    Done,
    EventPage,
    FencePage,
    LogSummary,
    OpenRunPage,
    Operation,
    ReadRange,
    ThreadSummary,
)
from agent_service.log.rules import (
    bounded,
    check_append,
    check_fences_of,
    check_seal,
    cut_page,
    most_fences,
    most_open_runs,
    most_threads,
    nobody,
    page_after,
    parse_page,
    thread_summary,
    with_first_title,
)
from agent_service.log.submitting import OneByOne
from steward.model.keys import Epoch, Sequence, StreamId, UserKey


@dataclass(slots=True)
class _Stream:
    row: int
    stream_id: StreamId
    fence: Epoch
    activation: str
    last_append_number: int = 0
    events: list[StoredEvent] = field(default_factory=list)
    records: dict[tuple[RecordKind, str], Record] = field(default_factory=dict)
    runs: int = 0

    def copy(self) -> "_Stream":
        return _Stream(
            self.row,
            self.stream_id,
            self.fence,
            self.activation,
            self.last_append_number,
            list(self.events),
            dict(self.records),
            self.runs,
        )

    def put(self, record: Record) -> None:
        key = (record.kind, record.key)
        known = self.records.get(key)
        if record.kind is RecordKind.RUN and known is None:
            self.runs += 1
        elif record.kind is RecordKind.THREAD:
            value = with_first_title(known.value if known else None, record.value)
            record = Record(record.kind, record.key, value)
        self.records[key] = record

    def delete(self, record: Record) -> None:
        known = self.records.pop((record.kind, record.key), None)
        if known is not None and record.kind is RecordKind.RUN:
            self.runs -= 1


@dataclass(frozen=True, slots=True)
class LogSnapshot:
    """All that a log holds at one moment. Opaque: made by `snapshot`, taken by `restore`."""

    streams: tuple[tuple[UserKey, _Stream], ...]


def new_stream_id() -> StreamId:
    """A random identity for a stream."""
    return StreamId(secrets.token_hex(8))


class LogState:
    """Every user's stream. `make_stream_id` names new ones; give a seeded one to repeat a run."""

    __slots__ = ("_make_stream_id", "_open", "_streams")

    def __init__(self, make_stream_id: Callable[[], StreamId]) -> None:
        self._make_stream_id = make_stream_id
        self._streams: dict[UserKey, _Stream] = {}
        # Users who have a RUN record: changes with the records.
        self._open: set[UserKey] = set()

    def seal(self, seal: Seal) -> SealOutcome:
        """Raise the fence and read the start, as one step. ValueError for a malformed seal."""
        check_seal(seal)
        stream = self._streams.get(seal.user)
        if stream is None:
            row = len(self._streams) + 1
            stream = _Stream(row, self._make_stream_id(), seal.epoch, seal.activation)
            self._streams[seal.user] = stream
        elif seal.epoch > stream.fence:
            stream.fence = seal.epoch
            stream.activation = seal.activation
            stream.last_append_number = 0
        elif seal.epoch < stream.fence or seal.activation != stream.activation:
            return Fenced(stream.fence)
        kept = (r for (kind, _), r in stream.records.items() if kind is not RecordKind.THREAD)
        return Sealed(
            stream_id=stream.stream_id,
            next_sequence=Sequence(len(stream.events) + 1),
            oldest_sequence=Sequence(1),
            records=tuple(sorted(kept, key=lambda record: (record.kind, record.key))),
            last_append_number=stream.last_append_number,
        )

    def append(self, append: Append) -> AppendOutcome:
        """Write all of it or nothing. ValueError for a malformed append."""
        check_append(append)
        stream = self._streams.get(append.user)
        if stream is None:
            return Fenced(Epoch(0))
        if append.epoch != stream.fence:
            return Fenced(stream.fence)
        head = Sequence(len(stream.events) + 1)
        if append.append_number == stream.last_append_number:
            return Committed(head)
        if (
            append.append_number != stream.last_append_number + 1
            or append.expected_sequence != head
        ):
            return Conflict(head)
        stream.last_append_number = append.append_number
        stream.events.extend(append.events)
        for record in append.records:
            if record.deleted:
                stream.delete(record)
            else:
                stream.put(record)
        if stream.runs:
            self._open.add(append.user)
        else:
            self._open.discard(append.user)
        return Committed(Sequence(len(stream.events) + 1))

    def read(self, user: UserKey, wanted: ReadRange) -> EventPage:
        """Stored events of one user."""
        stream = self._streams.get(user)
        if stream is None:
            return EventPage(StreamId(""), (), (), 0, 1, False)
        wanted = bounded(wanted)
        found = _matching(stream.events, wanted)
        return cut_page(found, wanted, stream.stream_id, len(stream.events), 1)

    def threads(self, user: UserKey, limit: int, page: str) -> tuple[list[ThreadSummary], str]:
        """Threads of one user, newest first, and the page after these."""
        limit = most_threads(limit)
        sequence, thread_id = parse_page(page)
        stream = self._streams.get(user)
        records = stream.records.items() if stream is not None else ()
        all_threads = [
            thread_summary(key, record.value)
            for (kind, key), record in records
            if kind is RecordKind.THREAD
        ]
        all_threads.sort(key=lambda thread: (-thread.sequence, thread.thread_id))
        later = [t for t in all_threads if (-t.sequence, t.thread_id) > (-sequence, thread_id)]
        listed = later[:limit]
        return listed, page_after(listed[-1]) if len(later) > limit else ""

    def open_runs(self, after: UserKey | None, limit: int) -> OpenRunPage:
        """Users who have an open run, in the order of their first seals."""
        limit = most_open_runs(limit)
        row = 0
        if after is not None:
            stream = self._streams.get(after)
            if stream is None:
                raise nobody(after)
            row = stream.row
        found = sorted((self._streams[user].row, user) for user in self._open)
        later = [user for number, user in found if number > row]
        return OpenRunPage(tuple(later[:limit]), len(later) > limit)

    def fences_of(self, users: Several[UserKey]) -> FencePage:
        """The fences of these users."""
        check_fences_of(users)
        streams = self._streams
        return FencePage(tuple((u, streams[u].fence) for u in dict.fromkeys(users) if u in streams))

    def fences(self, after: UserKey | None, limit: int) -> FencePage:
        """All fences, in the order of the users' first seals."""
        limit = most_fences(limit)
        if after is not None and after not in self._streams:
            raise nobody(after)
        # Users are kept in that order, and never removed.
        row = self._streams[after].row if after is not None else 0
        later = islice(self._streams.items(), row, row + limit + 1)
        found = [(user, stream.fence) for user, stream in later]
        return FencePage(tuple(found[:limit]), len(found) > limit)

    def summary(self, log_id: str) -> LogSummary:
        """Totals of all streams."""
        streams = self._streams.values()
        return LogSummary(
            log_id=log_id,
            streams=len(self._streams),
            events=sum(len(stream.events) for stream in streams),
            largest_fence=max((stream.fence for stream in streams), default=0),
            open_runs=sum(self._streams[user].runs for user in self._open),
        )

    def snapshot(self) -> LogSnapshot:
        """What a crash at this moment would leave."""
        return LogSnapshot(tuple((user, stream.copy()) for user, stream in self._streams.items()))

    def restore(self, snapshot: LogSnapshot) -> None:
        """Go back to a snapshot, of this state or another. It may be restored again."""
        self._streams = {user: stream.copy() for user, stream in snapshot.streams}
        self._open = {user for user, stream in self._streams.items() if stream.runs}


def _matching(events: list[StoredEvent], wanted: ReadRange) -> Iterator[tuple[int, bytes]]:
    span = range(wanted.after, min(wanted.until, len(events)))
    for index in reversed(span) if wanted.newest else span:
        event = events[index]
        if wanted.thread_id and event.thread_id != wanted.thread_id:
            continue
        if wanted.conversation and not event.conversation:
            continue
        yield index + 1, event.payload


class MemoryLog:
    """The `EventLog` port over a `LogState`. Appends are answered in the next turn of the loop."""

    def __init__(self, state: LogState | None = None) -> None:
        self._one_by_one = OneByOne(self.submit)
        self.state = state if state is not None else LogState(new_stream_id)
        self._log_id = secrets.token_hex(8)

    def submit(self, operations: Several[Operation], size: int, done: Done) -> None:
        """Done at once, and told in the next turn of the loop."""
        outcomes = [
            self.state.append(one) if isinstance(one, Append) else self.state.seal(one)
            for one in operations
        ]
        asyncio.get_running_loop().call_soon(done, outcomes)

    def append(self, append: Append) -> "Future[AppendOutcome]":
        """Start a fenced append. As in the port."""
        return self._one_by_one.append(append)

    async def seal(self, seal: Seal) -> SealOutcome:
        """Raise the fence and read the start, atomically. As in the port."""
        return await self._one_by_one.seal(seal)

    async def read(self, user: UserKey, wanted: ReadRange) -> EventPage:
        """Stored events; needs no ownership."""
        return self.state.read(user, wanted)

    async def threads(
        self, user: UserKey, limit: int, page: str
    ) -> tuple[list[ThreadSummary], str]:
        """A page of threads, newest first."""
        return self.state.threads(user, limit, page)

    async def open_runs(self, after: UserKey | None, limit: int) -> OpenRunPage:
        """A page of the users who have an open run."""
        return self.state.open_runs(after, limit)

    async def fences_of(self, users: Several[UserKey]) -> FencePage:
        """The fences of these users."""
        return self.state.fences_of(users)

    async def fences(self, after: UserKey | None, limit: int) -> FencePage:
        """A page of all fences."""
        return self.state.fences(after, limit)

    async def describe(self) -> LogSummary:
        """Totals, for operators."""
        return self.state.summary(self._log_id)

    async def close(self) -> None:
        """Nothing to let go."""
