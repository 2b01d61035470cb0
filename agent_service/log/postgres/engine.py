"""The event log in PostgreSQL: any number of log processes on one database.

Guarantees: an outcome is released only after its transaction is committed
(synchronous_commit on); who may write is decided by the database, under the lock of the
user's row, whichever process asks; a group whose answer was lost is sent again unchanged and
recognised. While the database is away everything waits, and `away` says why.

What waits travels together: `writers` lanes take it in turn, each with a connection of
its own and one group under way, so that an idle log adds no latency and a busy one shares its
commits. Reads have their own connections (`reader.py`).
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import asyncpg

from agent_service.core.journal import Append, Seal
from agent_service.log.counting import CommitCounter
from agent_service.log.memory import new_stream_id
from agent_service.log.port import (
    Compaction,
    EventPage,
    FencePage,
    LogFailed,
    LogSummary,
    OpenRunPage,
    Operation,
    Outcome,
    ReadRange,
    ThreadSummary,
)
from agent_service.log.postgres import groups
from agent_service.log.postgres.connecting import Database
from agent_service.log.postgres.migrations import SLOTS
from agent_service.log.postgres.migrator import migrate
from agent_service.log.postgres.reader import PostgresReader
from agent_service.log.submitting import Submitting, Work
from agent_service.log.writer import Group
from steward.errors import Reason, StewardError
from steward.model.keys import UserKey
from steward.postgres.connecting import Backoff, is_passing
from steward.telemetry.catalog import LogMetrics

MOST_GROUP_BYTES = 8 * 1024 * 1024
LEAST_SHARE = 64
"""Operations that one lane takes at once, if there are as many, however few all lanes have."""
GROUP_S = 10.0
"""The longest that a group is waited for; then its connection is given up, and it is sent again."""
CLOSE_S = 5.0
COMPACT_STREAMS = 64
"""Streams that one step of a compaction locks, for the time that it takes."""
COMPACT = "SELECT * FROM steward.compact_v1(to_timestamp($1::float8 / 1000), $2, $3)"

_logger = logging.getLogger("steward.log")


class PostgresLog(Submitting):
    """The `EventLog` port over a PostgreSQL database. One event loop; `open` before all else."""

    def __init__(
        self,
        database: Database,
        metrics: LogMetrics,
        *,
        commit_appends: int = 1000,
        writers: int = 4,
        readers: int = 4,
    ) -> None:
        super().__init__()
        self._database = database
        self._counter = CommitCounter(metrics)
        self._commit_appends = commit_appends
        self._writers = writers
        self._reader = PostgresReader(database, readers)
        self._queue: deque[Work] = deque()
        metrics.waiting.set_function(lambda: len(self._queue))
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._lanes: list[asyncio.Task[None]] = []
        # Between the steps of one compaction.
        self._compacting: asyncpg.Connection | None = None
        self.log_id = ""
        self.away: str | None = "the event log's database has not answered yet"

    async def open(self) -> None:
        """Wait for the database, bring its tables up to date, start the lanes.

        Raises EnvironmentUnusable for a database, role or URL that can't be used.
        """
        self.log_id = await self._database.prepare(self._is_away, migrate)
        self.away = None
        self._lanes = [asyncio.create_task(self._lane()) for _ in range(self._writers)]
        for lane in self._lanes:
            lane.add_done_callback(self._lane_ended)

    def _put(self, work: Work) -> None:
        self._idle.clear()
        self._queue.append(work)
        self._wake.set()

    async def read(self, user: UserKey, wanted: ReadRange) -> EventPage:
        """Stored events. As in the port."""
        return await self._reader.events(user, wanted)

    async def threads(
        self, user: UserKey, limit: int, page: str
    ) -> tuple[list[ThreadSummary], str]:
        """A page of threads, newest first. As in the port."""
        return await self._reader.threads(user, limit, page)

    async def open_runs(self, after: UserKey | None, limit: int) -> OpenRunPage:
        """A page of the users who have an open run. As in the port."""
        return await self._reader.open_runs(after, limit)

    async def fences_of(self, users: Sequence[UserKey]) -> FencePage:
        """The fences of these users. As in the port."""
        return await self._reader.fences_of(users)

    async def fences(self, after: UserKey | None, limit: int) -> FencePage:
        """A page of all fences. As in the port."""
        return await self._reader.fences(after, limit)

    async def describe(self) -> LogSummary:
        """Totals, for operators."""
        return await self._reader.summary(self.log_id)

    async def compact(self, before_ms: int, after: int = 0) -> Compaction:
        """One step of removing old events, of some streams. As in the port.

        `after` counts streams. While another process compacts this database there is nothing to do.
        """
        if self._failure is not None:
            raise self._failure
        connection, self._compacting = self._compacting, None
        try:
            async with asyncio.timeout(GROUP_S):
                if connection is None:
                    connection = await self._database.connect()
                async with connection.transaction():
                    row = await connection.fetchrow(COMPACT, before_ms, after, COMPACT_STREAMS)
            self._compacting, connection = connection, None
        except Exception as error:
            if not is_passing(error):
                raise LogFailed(f"the event log's database failed a compaction: {error}") from error
            text = "the event log's database is out of reach; try again"
            raise StewardError(Reason.STORE_UNAVAILABLE, text) from error
        finally:
            if connection is not None:
                connection.terminate()
        assert row is not None, "a step is one row"
        if row["after"] is None or self._closed:
            self._compacting.terminate()
            self._compacting = None
        return Compaction(row["removed"], row["after"])

    async def close(self) -> None:
        """Commit what waits, if the database answers within a bound. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(CLOSE_S):
                if self._lanes:
                    await self._idle.wait()
        except TimeoutError:
            _logger.warning("event log closed with writes that had no answer")
        for lane in self._lanes:
            lane.cancel()
        if self._lanes:
            await asyncio.wait(self._lanes)
        self._one_by_one.cancel()
        if self._compacting is not None:
            self._compacting.terminate()
            self._compacting = None
        await self._reader.close()

    # ---- the lanes

    async def _lane(self) -> None:
        """Take what waits and commit it, one group after another."""
        connection: asyncpg.Connection | None = None
        try:
            while True:
                works = await self._take()
                operations = [operation for work in works for operation in work.operations]
                backoff = Backoff()
                began = time.perf_counter()
                while True:
                    try:
                        # One that was lost while this lane was idle says nothing of today.
                        if connection is None or connection.is_closed():
                            connection = await self._database.connect()
                        async with asyncio.timeout(GROUP_S):
                            group = await self._commit(connection, operations)
                        break
                    except Exception as error:
                        # What became of it is unknown; it is asked again as it is.
                        if connection is not None:
                            connection.terminate()
                            connection = None
                        if not is_passing(error):
                            self._give_up(error, works)
                            return
                        self._is_away(error)
                    await backoff.pause()
                self.away = None
                self._counter.count(operations, group, time.perf_counter() - began)
                self._deliver(works, group.outcomes)
        finally:
            if connection is not None:
                connection.terminate()

    def _lane_ended(self, lane: asyncio.Task[None]) -> None:
        """A lane that ends by an error of ours must not leave writes waiting for ever."""
        if not lane.cancelled() and isinstance(error := lane.exception(), Exception):
            self._give_up(error, [])

    async def _take(self) -> list[Work]:
        """This lane's share of what waits, within the bounds of one group; waits for the first.

        Shares, so that one group is made up and another one written while a third is flushed.
        """
        while not self._queue:
            self._wake.clear()
            await self._wake.wait()
        share = max(LEAST_SHARE, -(-self._waiting // self._writers))
        most = min(share, self._commit_appends)
        works: list[Work] = []
        number = size = 0
        while self._queue and number < most and size < MOST_GROUP_BYTES:
            work = self._queue.popleft()
            works.append(work)
            number += len(work.operations)
            size += work.size
        return works

    async def _commit(
        self, connection: asyncpg.Connection, operations: Sequence[Operation]
    ) -> Group:
        """Make the operations durable, in order; the same ones may have been tried before."""
        outcomes: list[Outcome | None] = [None] * len(operations)
        events = repeated = 0
        slot = random.randrange(SLOTS)
        for indexes in groups.rounds(operations):
            seals = [(i, op) for i in indexes if isinstance(op := operations[i], Seal)]
            if seals:
                asked = groups.seal_arguments(
                    [seal for _, seal in seals], [new_stream_id() for _ in seals]
                )
                rows = await self._ask(connection, groups.SEAL, slot, asked)
                found = groups.seal_outcomes(len(seals), rows)
                for (index, _), sealed in zip(seals, found, strict=True):
                    outcomes[index] = sealed
            appends = [(i, op) for i in indexes if isinstance(op := operations[i], Append)]
            if appends:
                groups.in_order(appends)
                written = [append for _, append in appends]
                asked = groups.append_arguments(written)
                rows = await self._ask(connection, groups.APPEND, slot, asked)
                done, verdicts = groups.append_outcomes(written, rows)
                for (index, append), outcome, verdict in zip(appends, done, verdicts, strict=True):
                    outcomes[index] = outcome
                    events += len(append.events) if verdict == groups.WRITTEN else 0
                    repeated += verdict == groups.REPEATED
        return Group(cast("list[Outcome]", outcomes), events, repeated)

    async def _ask(
        self, connection: asyncpg.Connection, sql: str, slot: int, arguments: list[Any]
    ) -> list[Any]:
        """One statement, which is one transaction."""
        if not self._database.pooled:
            return cast("list[Any]", await connection.fetch(sql, slot, *arguments))
        # A pooler keeps us on one session for a transaction only: what is prepared must stay there.
        async with connection.transaction():
            return cast("list[Any]", await connection.fetch(sql, slot, *arguments))

    def _settle(self, work: Work, outcomes: Sequence[Outcome] | LogFailed) -> None:
        try:
            super()._settle(work, outcomes)
        finally:
            if not self._waiting:
                self._idle.set()

    def _is_away(self, error: BaseException) -> None:
        known = self.away is not None and self.log_id
        self.away = self._database.away(error)
        if not known:
            _logger.warning(self.away)

    def _give_up(self, error: Exception, works: list[Work]) -> None:
        """Whatever it was, this program and that database don't fit: the process has to end."""
        failure = self._fail(error)
        for work in [*works, *self._queue]:
            self._settle(work, failure)
        self._queue.clear()
