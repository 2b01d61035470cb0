"""The event log of one machine: SQLite, one writer thread, what waits commits together.

Guarantees: an outcome is released only after its transaction is durable (WAL,
synchronous=FULL); operations are applied in the order in which they were submitted;
reads see committed groups only and never delay a commit. While a group is being
written the next one collects, so an idle log adds no latency and a busy one shares its
fsync. Under load groups begin at most every `PACE_S`: what a commit costs is the same for
three operations as for thirty, and each answer costs its node, and an edge, as much again.

When the engine fails (EIO, disk full, a corrupt page) everything that waits, and all
that comes later, gets `LogFailed`, and `failed()` returns: the process must end, since
what the file holds after a failed fsync can't be known from inside.
"""

import asyncio
import logging
import sqlite3
import threading
import time
from asyncio import Future
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from agent_service.log.compacting import CLOCK_MS, CompactionStep
from agent_service.log.counting import CommitCounter
from agent_service.log.database import DatabaseFile, open_database
from agent_service.log.memory import new_stream_id
from agent_service.log.packing import ChunkCorrupt
from agent_service.log.port import (
    Compaction,
    EventPage,
    FencePage,
    LogFailed,
    LogSummary,
    OpenRunPage,
    ReadRange,
    ThreadSummary,
)
from agent_service.log.reader import (
    read_events,
    read_fences,
    read_fences_of,
    read_open_runs,
    read_summary,
    read_threads,
)
from agent_service.log.submitting import Submitting, Work
from agent_service.log.writer import Group, GroupWriter
from steward.errors import Reason, StewardError
from steward.model.keys import UserKey
from steward.telemetry.catalog import LogMetrics

MOST_COMMIT_BYTES = 8 * 1024 * 1024
MOST_READS_WAITING = 1024

PACE_S = 0.002
"""From the beginning of a group to that of the next one, at least, while the log is busy."""

BUSY = 4
"""A group of fewer operations shows that waiting would bring little company: the next one is
written when it comes."""

_logger = logging.getLogger("steward.log")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of a compaction, and who waits for what it removed."""

    step: CompactionStep
    done: "Future[Compaction]"


class SqliteLog(Submitting):
    """The `EventLog` port over `<data>/events.db`. One event loop; `open` before all else.

    `commit_appends` bounds the operations of one transaction (what was submitted together
    is never split); `readers` is the number of reads that run side by side; ages of events are
    known by `clock_ms`.
    """

    def __init__(
        self,
        data: Path,
        metrics: LogMetrics,
        *,
        commit_appends: int = 1000,
        readers: int = 2,
        clock_ms: int = CLOCK_MS,
    ) -> None:
        super().__init__()
        self._data = data
        self._counter = CommitCounter(metrics)
        self._commit_appends = commit_appends
        self._readers = readers
        self._clock_ms = clock_ms
        self._queue: SimpleQueue[Work | _Step | None] = SimpleQueue()
        metrics.waiting.set_function(self._queue.qsize)
        # When the last group was begun, and its operations; the writer thread's.
        self._began = 0.0
        self._last = 0
        self._reading = 0
        self._connections: SimpleQueue[sqlite3.Connection] = SimpleQueue()

    async def open(self) -> None:
        """Take the lock, open the file, start the threads.

        Raises EnvironmentUnusable when another process has the file or it can't be used.
        """
        self._loop = asyncio.get_running_loop()
        self._file: DatabaseFile = await self._loop.run_in_executor(None, open_database, self._data)
        for _ in range(self._readers):
            self._connections.put(self._file.reader())
        self._pool = ThreadPoolExecutor(self._readers, thread_name_prefix="log-reader")
        self._writer = threading.Thread(target=self._write, name="log-writer", daemon=True)
        self._writer.start()

    @property
    def away(self) -> str | None:
        """A file is never out of reach: it works, or the log has failed."""
        return None

    @property
    def log_id(self) -> str:
        """Identity of the database, made with it."""
        return self._file.log_id

    def _put(self, work: Work) -> None:
        self._queue.put(work)

    async def read(self, user: UserKey, wanted: ReadRange) -> EventPage:
        """Stored events. As in the port."""
        tail = self._file.tail
        return await self._read(lambda connection: read_events(connection, tail, user, wanted))

    async def threads(
        self, user: UserKey, limit: int, page: str
    ) -> tuple[list[ThreadSummary], str]:
        """A page of threads, newest first. As in the port."""
        return await self._read(lambda connection: read_threads(connection, user, limit, page))

    async def open_runs(self, after: UserKey | None, limit: int) -> OpenRunPage:
        """A page of the users who have an open run. As in the port."""
        return await self._read(lambda connection: read_open_runs(connection, after, limit))

    async def fences_of(self, users: Sequence[UserKey]) -> FencePage:
        """The fences of these users. As in the port."""
        return await self._read(lambda connection: read_fences_of(connection, users))

    async def fences(self, after: UserKey | None, limit: int) -> FencePage:
        """A page of all fences. As in the port."""
        return await self._read(lambda connection: read_fences(connection, after, limit))

    async def describe(self) -> LogSummary:
        """Totals, for operators."""
        return await self._read(lambda connection: read_summary(connection, self.log_id))

    async def compact(self, before_ms: int, after: int = 0) -> Compaction:
        """One step of removing old events, in its turn among what is written. As in the port."""
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise StewardError(Reason.STORE_UNAVAILABLE, "the event log is closed")
        done: Future[Compaction] = self._loop.create_future()
        self._queue.put(_Step(CompactionStep(before_ms, after), done))
        return await done

    async def close(self) -> None:
        """Commit what waits, then let go of the file. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        await self._loop.run_in_executor(None, self._release)

    def _release(self) -> None:
        self._writer.join()
        self._pool.shutdown()
        while not self._connections.empty():
            self._connections.get().close()
        self._file.close()

    async def _read(self, query: Callable[[sqlite3.Connection], Result]) -> Result:
        if self._failure is not None:
            raise self._failure
        if self._closed or self._reading >= MOST_READS_WAITING:
            raise StewardError(Reason.STORE_UNAVAILABLE, "too many reads wait; try again")

        def run() -> Result:
            connection = self._connections.get()
            try:
                return query(connection)
            finally:
                self._connections.put(connection)

        self._reading += 1
        try:
            return await self._loop.run_in_executor(self._pool, run)
        except (sqlite3.Error, ChunkCorrupt) as error:
            raise self._fail(error) from error
        finally:
            self._reading -= 1

    def _write(self) -> None:
        """The writer thread: commit what waits and hand back the outcomes, until told to end."""
        writer = GroupWriter(
            self._file.writer, self._file.tail, new_stream_id, clock_ms=self._clock_ms
        )
        while taken := self._take():
            works, step = taken
            operations = [operation for work in works for operation in work.operations]
            began = time.perf_counter()
            try:
                group = writer.commit(operations, step.step if step is not None else None)
            except Exception as error:
                # Whatever it was, the file's state is unknown from here on.
                self._loop.call_soon_threadsafe(self._abandon, works, step, error)
                return
            if operations:
                self._counter.count(operations, group, time.perf_counter() - began)
            self._loop.call_soon_threadsafe(self._committed, works, step, group)

    def _take(self) -> tuple[list[Work], _Step | None] | None:
        """What waits, within the bounds of one transaction; waits for the first. None: the end.

        A step of a compaction is the last of its transaction.
        """
        works: list[Work] = []
        number = size = 0
        pace_s = PACE_S if self._last >= BUSY else 0.0
        while number < self._commit_appends and size < MOST_COMMIT_BYTES:
            try:
                work = self._queue.get(block=not works)
            except Empty:
                break
            if work is None:
                if not works:
                    return None
                self._queue.put(None)
                break
            if isinstance(work, _Step):
                return works, work
            works.append(work)
            number += len(work.operations)
            size += work.size
            if pace_s:
                # Nobody has to wake this thread for what comes meanwhile.
                time.sleep(max(0.0, self._began + pace_s - time.monotonic()))
                pace_s = 0.0
        self._began, self._last = time.monotonic(), number
        return works, None

    def _committed(self, works: list[Work], step: _Step | None, group: Group) -> None:
        if self._failure is not None:
            # A read met damage: nothing may be told to be safe any more.
            self._tell(works, step, self._failure)
            return
        if step is not None and group.compaction is not None and not step.done.done():
            step.done.set_result(group.compaction)
        self._deliver(works, group.outcomes)

    def _abandon(self, works: list[Work], step: _Step | None, error: Exception) -> None:
        failure = self._fail(error)
        self._tell(works, step, failure)
        while not self._queue.empty():
            left = self._queue.get()
            if isinstance(left, _Step):
                self._tell([], left, failure)
            elif left is not None:
                self._tell([left], None, failure)

    def _tell(self, works: list[Work], step: _Step | None, failure: LogFailed) -> None:
        if step is not None and not step.done.done():
            step.done.set_exception(failure)
        for work in works:
            self._settle(work, failure)
