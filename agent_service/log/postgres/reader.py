"""Reads of the event log in PostgreSQL: each on one snapshot, over a bounded set of connections."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from agent_service.log.packing import ChunkCorrupt, unpack
from agent_service.log.port import (
    EventPage,
    FencePage,
    LogFailed,
    LogSummary,
    OpenRunPage,
    ReadRange,
    ThreadSummary,
)
from agent_service.log.postgres.connecting import Database
from agent_service.log.rules import (
    bounded,
    check_fences_of,
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
from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, StreamId, UserKey
from steward.postgres.connecting import is_passing
from steward.postgres.texts import original, stored

READ_S = 5.0
MOST_READS_WAITING = 1024
ROWS_AT_ONCE = 256

_ONE = "SELECT set_config('steward.tenants', ARRAY[$1]::text[]::text, true)"
_ALL = "SELECT set_config('steward.scope', 'all', true)"
_STREAM = (
    "SELECT id, stream_id, oldest, next FROM steward.stream WHERE tenant = $1 AND user_id = $2"
)


class PostgresReader:
    """Reads over at most `connections` connections, which are made when they are needed."""

    def __init__(self, database: Database, connections: int) -> None:
        self._database = database
        self._room = asyncio.Semaphore(connections)
        self._free: list[asyncpg.Connection] = []
        self._reading = 0
        self._closed = False

    async def close(self) -> None:
        """Let go of the connections. Safe to call twice."""
        self._closed = True
        while self._free:
            self._free.pop().terminate()

    async def events(self, user: UserKey, wanted: ReadRange) -> EventPage:
        """A page of one user's events. Raises as the port says, and LogFailed for damage."""
        wanted = bounded(wanted)
        async with self._snapshot(_ONE, stored(user.tenant)) as connection:
            stream = await connection.fetchrow(_STREAM, *map(stored, user))
            if stream is None:
                return EventPage(StreamId(""), (), (), 0, 1, False)
            row, stream_id, oldest, following = stream
            found: list[tuple[int, bytes]] = []
            size = 0
            after, until = max(wanted.after, oldest - 1), min(wanted.until, following - 1)
            while after < until:
                chunks = await _chunks(connection, row, wanted, after, until)
                for first, count, packed in chunks:
                    matching = _matching(first, unpack(count, packed), wanted, after, until)
                    found += matching
                    size += sum(len(payload) for _, payload in matching)
                    if wanted.newest:
                        until = min(until, first - 1)
                    else:
                        after = max(after, first + count - 1)
                if len(chunks) < ROWS_AT_ONCE:
                    break
                if len(found) > wanted.limit or size > wanted.max_bytes:
                    break
        return cut_page(found, wanted, StreamId(stream_id), following - 1, oldest)

    async def threads(
        self, user: UserKey, limit: int, page: str
    ) -> tuple[list[ThreadSummary], str]:
        """A page of one user's threads, newest first, and the page after it."""
        limit = most_threads(limit)
        sequence, thread_id = parse_page(page)
        async with self._snapshot(_ONE, stored(user.tenant)) as connection:
            rows = await connection.fetch(
                "SELECT thread_id, titled, value FROM steward.thread WHERE stream ="
                " (SELECT id FROM steward.stream WHERE tenant = $1 AND user_id = $2)"
                " AND sequence <= $3 AND (sequence < $3 OR thread_id > $4)"
                " ORDER BY sequence DESC, thread_id LIMIT $5",
                *map(stored, user),
                sequence,
                stored(thread_id),
                limit + 1,
            )
        listed = [
            thread_summary(original(key), with_first_title(titled, value))
            for key, titled, value in rows[:limit]
        ]
        return listed, page_after(listed[-1]) if len(rows) > limit else ""

    async def open_runs(self, after: UserKey | None, limit: int) -> OpenRunPage:
        """A page of the users who have an open run, by the index of RUN records alone."""
        limit = most_open_runs(limit)
        async with self._snapshot(_ALL) as connection:
            rows = await connection.fetch(
                "SELECT s.tenant, s.user_id FROM (SELECT DISTINCT stream FROM steward.record"
                " WHERE kind = 2 AND stream > $1 ORDER BY stream LIMIT $2) r"
                " JOIN steward.stream s ON s.id = r.stream ORDER BY s.id",
                await _row_of(connection, after),
                limit + 1,
            )
        users = tuple(UserKey(original(tenant), original(user)) for tenant, user in rows[:limit])
        return OpenRunPage(users, len(rows) > limit)

    async def fences_of(self, users: Sequence[UserKey]) -> FencePage:
        """The fences of these users, by the key of streams."""
        check_fences_of(users)
        wanted = list(dict.fromkeys(users))
        async with self._snapshot(_ALL) as connection:
            rows = await connection.fetch(
                "SELECT w.place, s.fence FROM"
                " unnest($1::text[], $2::text[]) WITH ORDINALITY AS w (tenant, user_id, place)"
                " JOIN steward.stream s ON s.tenant = w.tenant AND s.user_id = w.user_id",
                [stored(user.tenant) for user in wanted],
                [stored(user.user) for user in wanted],
            )
        return FencePage(tuple((wanted[place - 1], Epoch(fence)) for place, fence in rows))

    async def fences(self, after: UserKey | None, limit: int) -> FencePage:
        """A page of all fences, in the order of streams."""
        limit = most_fences(limit)
        async with self._snapshot(_ALL) as connection:
            rows = await connection.fetch(
                "SELECT tenant, user_id, fence FROM steward.stream WHERE id > $1"
                " ORDER BY id LIMIT $2",
                await _row_of(connection, after),
                limit + 1,
            )
        found = tuple(
            (UserKey(original(tenant), original(user)), Epoch(fence))
            for tenant, user, fence in rows[:limit]
        )
        return FencePage(found, len(rows) > limit)

    async def summary(self, log_id: str) -> LogSummary:
        """Totals, from counters and indexes."""
        async with self._snapshot(_ALL) as connection:
            row = await connection.fetchrow(
                "SELECT (SELECT sum(streams) FROM steward.total)::bigint,"
                " (SELECT sum(events) FROM steward.total)::bigint,"
                " (SELECT coalesce(max(fence), 0) FROM steward.stream),"
                " (SELECT count(*) FROM steward.record WHERE kind = 2)"
            )
        assert row is not None, "totals are one row"
        return LogSummary(log_id, *row)

    @asynccontextmanager
    async def _snapshot(self, scope: str, *tenant: str) -> AsyncIterator[asyncpg.Connection]:
        """A read-only transaction on one snapshot that sees one tenant, or all.

        Raises StewardError(STORE_UNAVAILABLE) when the database can't be asked within READ_S.
        """
        if self._closed or self._reading >= MOST_READS_WAITING:
            raise StewardError(Reason.STORE_UNAVAILABLE, "too many reads wait; try again")
        self._reading += 1
        connection: asyncpg.Connection | None = None
        try:
            async with asyncio.timeout(READ_S), self._room:
                connection = self._free.pop() if self._free else await self._database.connect()
                async with connection.transaction(isolation="repeatable_read", readonly=True):
                    await connection.execute(scope, *tenant)
                    yield connection
                self._free.append(connection)
                connection = None
        except StewardError:
            raise
        except ChunkCorrupt as error:
            raise LogFailed(f"the event log's database is damaged: {error}") from error
        except Exception as error:
            if not is_passing(error):
                raise LogFailed(f"the event log's database failed a read: {error}") from error
            raise StewardError(
                Reason.STORE_UNAVAILABLE, "the event log's database is out of reach; try again"
            ) from error
        finally:
            self._reading -= 1
            if connection is not None:
                connection.terminate()


async def _chunks(
    connection: asyncpg.Connection, row: int, wanted: ReadRange, after: int, until: int
) -> list[Any]:
    """The next chunks with events in `after < sequence <= until`, in the direction of reading."""
    # The chunk that holds after + 1 may begin before it.
    sql = (
        "SELECT first, count, packed FROM steward.chunk WHERE stream = $1 AND first <= $3"
        " AND first >= coalesce((SELECT max(first) FROM steward.chunk"
        " WHERE stream = $1 AND first <= $2 + 1), 0)"
    )
    values: list[object] = [row, after, until]
    if wanted.thread_id:
        sql += " AND thread_id = $4"
        values.append(stored(wanted.thread_id))
    if wanted.conversation:
        sql += " AND conversation"
    order = "DESC" if wanted.newest else "ASC"
    return list(
        await connection.fetch(f"{sql} ORDER BY first {order} LIMIT {ROWS_AT_ONCE}", *values)
    )


def _matching(
    first: int, events: Any, wanted: ReadRange, after: int, until: int
) -> list[tuple[int, bytes]]:
    """The wanted events of a chunk, in the direction of reading."""
    found = [
        (sequence, payload)
        for sequence, (payload, conversation) in enumerate(events, first)
        if after < sequence <= until and (conversation or not wanted.conversation)
    ]
    if wanted.newest:
        found.reverse()
    return found


async def _row_of(connection: asyncpg.Connection, after: UserKey | None) -> int:
    """Behind which row a page begins. Raises StewardError for a user who has none."""
    if after is None:
        return 0
    stream = await connection.fetchrow(_STREAM, *map(stored, after))
    if stream is None:
        raise nobody(after)
    return int(stream["id"])
