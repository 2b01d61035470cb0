"""The `EventLog` port: what the host needs of an event log, whichever engine is behind it.

Every adapter passes the same conformance suite (`tests/integration/log`). An engine
that fails for good (EIO, disk full, corrupt) raises `LogFailed` and the process
exits; one that is merely out of reach keeps the append and sends the identical one
again, so that an append future ends with an outcome or with `LogFailed`, never with a
guess.
"""

from asyncio import Future
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from agent_service.core.journal import Append, AppendOutcome, Seal, SealOutcome
from steward.model.keys import Epoch, StreamId, UserKey


class LogFailed(Exception):
    """The engine failed for good: stop the process, as if it had been killed."""


class LogFull(Exception):
    """More appends wait than an adapter holds: somebody has several in flight for one user."""


@dataclass(frozen=True, slots=True)
class Compaction:
    """One step of a compaction: events removed, and where the next step goes on (None: done)."""

    removed: int
    after: int | None


Operation = Seal | Append
Outcome = SealOutcome | AppendOutcome
Done = Callable[[Sequence[Outcome] | LogFailed], None]
"""Told the outcomes of operations that were submitted together, in their order; once."""


@dataclass(frozen=True, slots=True)
class EventPage:
    """Stored events in ascending order. `head` is the last sequence of the stream, 0 when empty.

    `stream_id` is empty and `head` 0 for a user that was never sealed. `more` says that the asked
    range holds further events.
    """

    stream_id: StreamId
    events: tuple[bytes, ...]
    sequences: tuple[int, ...]
    head: int
    oldest_sequence: int
    more: bool


@dataclass(frozen=True, slots=True)
class ThreadSummary:
    """One thread of a user, newest first in listings."""

    thread_id: str
    title: str
    sequence: int
    updated_at: str


@dataclass(frozen=True, slots=True)
class LogSummary:
    """Totals of a log, for operators. `largest_fence` is 0 for an empty log."""

    log_id: str
    streams: int
    events: int
    largest_fence: int
    open_runs: int


@dataclass(frozen=True, slots=True)
class OpenRunPage:
    """Users who have an open run, each once. `more` says that others follow the last of them."""

    users: tuple[UserKey, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class FencePage:
    """The highest sealed epoch of users, each once. `more`: others follow the last of them."""

    fences: tuple[tuple[UserKey, Epoch], ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class ReadRange:
    """Which events: `after < sequence <= until` (0: no end), at most `limit` and `max_bytes`.

    `newest` takes the last `limit` events of the range instead of the first; the page is ascending
    in both cases. At least one event is returned if there is one, whatever its size.
    """

    after: int = 0
    until: int = 0
    limit: int = 500
    max_bytes: int = 262_144
    thread_id: str = ""
    newest: bool = False
    conversation: bool = False


class EventLog(Protocol):
    """A durable, fenced, per-user ordered log."""

    def append(self, append: Append) -> "Future[AppendOutcome]":
        """Start a fenced append; group commits are the engine's business. Never blocks.

        At most one append of an activation may be in flight; the next one is numbered one
        higher, and any other number than that or the last one is a Conflict. The future is
        pending as long as the engine is out of reach, and ends with an outcome or LogFailed.
        Raises ValueError for a malformed append, LogFull when more wait than the adapter holds.
        """
        ...

    def submit(self, operations: Sequence[Operation], size: int, done: Done) -> None:
        """Start operations that were checked before and carry `size` bytes. Never blocks.

        As by `append` and `seal`, for who has many at once: `done` is told all outcomes in one
        call on the loop, never within this one. Raises LogFull, and then none was started.
        """
        ...

    async def seal(self, seal: Seal) -> SealOutcome:
        """Raise the fence and read the start, atomically. Repeatable with the same activation.

        Raises as `append` does. Waits as long as the engine is out of reach.
        """
        ...

    async def read(self, user: UserKey, wanted: ReadRange) -> EventPage:
        """Stored events; needs no ownership.

        Raises StewardError(STORE_UNAVAILABLE) when the engine can't be reached in time.
        """
        ...

    async def threads(
        self, user: UserKey, limit: int, page: str
    ) -> tuple[list[ThreadSummary], str]:
        """A page of threads, newest first, and the `page` of the next one (empty at the end).

        Raises StewardError: PROTOCOL_VIOLATION for a `page` that no listing gave, and as `read`.
        """
        ...

    async def open_runs(self, after: UserKey | None, limit: int) -> OpenRunPage:
        """A page of the users who have a RUN record, in the order of their first seals.

        From an index that changes in the transaction of the record; `limit` is 1 to 1000. Raises
        StewardError: PROTOCOL_VIOLATION for an `after` that was never sealed, and as `read`.
        """
        ...

    async def fences_of(self, users: Sequence[UserKey]) -> FencePage:
        """The fences of these users, at most 1000; who was never sealed is not among them.

        Of one snapshot, at least as new as any seal that was answered before. Raises StewardError:
        PROTOCOL_VIOLATION for too many users, and as `read`.
        """
        ...

    async def fences(self, after: UserKey | None, limit: int) -> FencePage:
        """A page of all fences, in the order of the users' first seals; `limit` is 1 to 1000.

        Raises as `open_runs` does.
        """
        ...

    async def describe(self) -> LogSummary:
        """Totals; quick, however much the log holds. Raises as `read`."""
        ...

    async def close(self) -> None:
        """Wait, within a bound, for what is in flight, then let go. Safe to call twice.

        What has no answer then is cancelled: its outcome is unknown.
        """
        ...


class LogEngine(EventLog, Protocol):
    """An `EventLog` as the log process drives it: many operations at once, from many nodes."""

    @property
    def log_id(self) -> str:
        """Identity of the database, made with it. After `open`."""
        ...

    @property
    def away(self) -> str | None:
        """Why nothing can be written at present; None when all is well."""
        ...

    async def open(self) -> None:
        """Open the database; before all else. Waits for one that is out of reach.

        Raises EnvironmentUnusable for one that can't be used as it is.
        """
        ...

    async def compact(self, before_ms: int, after: int = 0) -> Compaction:
        """One bounded step of removing events that were written before a wall time.

        A sweep begins with `after` 0 and goes on with the `after` of each step until that is None.
        Of every user the events of the last append stay, whatever their age, and no event goes
        before an older one of its user; `oldest_sequence` is raised with it. Records and threads
        stay. Events may be kept for longer (an engine need not know each one's age exactly), never
        shorter. Raises StewardError(STORE_UNAVAILABLE), LogFailed.
        """
        ...

    async def failed(self) -> LogFailed:
        """Returns when the engine failed for good."""
        ...
