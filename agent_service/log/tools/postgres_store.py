"""The event log in a PostgreSQL database, at rest.

It is read on one snapshot, so a check may run beside log processes; whoever writes must be alone,
as far as the database can tell: behind a pooler it can't.
"""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from agent_service.log.postgres.connecting import Database
from agent_service.log.postgres.migrator import migrate
from agent_service.log.rules import has_title, with_first_title
from agent_service.log.tools.store import (
    StoredChunk,
    StoredRecord,
    StoredStream,
    StoredThread,
    Totals,
)
from steward.model.keys import UserKey
from steward.postgres.texts import original, stored
from steward.runtime.store_tool import StoreProblem

ROWS = 256
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_ALL = "SELECT set_config('steward.scope', 'all', false)"
_ONE = "SELECT set_config('steward.tenants', ARRAY[$1]::text[]::text, true)"
_STREAM = (
    "SELECT id, tenant, user_id, stream_id, fence, activation, oldest, next, number"
    " FROM steward.stream"
)
_COUNTS = {
    "chunks without a stream": "steward.chunk",
    "records without a stream": "steward.record",
    "threads without a stream": "steward.thread",
}


class PostgresStore:
    """`Store` over a database. `alone`: refuse to open while a log process is connected."""

    def __init__(self, url: str, *, alone: bool) -> None:
        self.name = "postgresql"
        self.log_id = ""
        self._database = Database(url)
        self._alone = alone
        self._connection: asyncpg.Connection | None = None
        self._snapshot: Any = None

    async def open(self) -> None:
        """As in the port. Raises StoreProblem while a log process is connected."""
        away: list[BaseException] = []

        def is_away(error: BaseException) -> None:
            away.append(error)
            raise StoreProblem(self._database.away(error)) from error

        self.log_id = await self._database.prepare(is_away, migrate)
        self._connection = connection = await self._database.connect()
        self.name = f"postgresql:{await connection.fetchval('SELECT current_database()')}"
        if self._alone:
            others = await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name = $1 AND pid <> pg_backend_pid()",
                Database.USE.application,
            )
            if others:
                await self.close()
                raise StoreProblem(f"{self.name} is in use by a log process; stop it first")
        else:
            self._snapshot = connection.transaction(isolation="repeatable_read", readonly=True)
            await self._snapshot.start()
        await connection.execute(_ALL)

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    @property
    def _db(self) -> asyncpg.Connection:
        assert self._connection is not None, "opened before"
        return self._connection

    async def totals(self) -> Totals:
        row = await self._db.fetchrow(
            "SELECT sum(streams)::bigint, sum(events)::bigint FROM steward.total"
        )
        assert row is not None, "sums are one row"
        return Totals(*row)

    async def streams(self) -> AsyncIterator[StoredStream]:
        after = 0
        sql = f"{_STREAM} WHERE id > $1 ORDER BY id LIMIT {ROWS}"
        while rows := await self._db.fetch(sql, after):
            for row in rows:
                yield _stream(row)
            after = rows[-1]["id"]

    async def stream(self, user: UserKey) -> StoredStream | None:
        row = await self._db.fetchrow(
            f"{_STREAM} WHERE tenant = $1 AND user_id = $2", *map(stored, user)
        )
        return _stream(row) if row is not None else None

    async def chunks(self, stream: StoredStream) -> AsyncIterator[StoredChunk]:
        after, number = 0, 0
        append: tuple[int, datetime] | None = None
        sql = (
            "SELECT first, count, epoch, at, thread_id, conversation, packed FROM steward.chunk"
            f" WHERE stream = $1 AND first > $2 ORDER BY first LIMIT {ROWS}"
        )
        while rows := await self._db.fetch(sql, stream.row, after):
            for first, count, epoch, at, thread_id, conversation, packed in rows:
                if (epoch, at) != append:
                    number = number + 1 if append is not None and append[0] == epoch else 1
                    append = (epoch, at)
                yield StoredChunk(
                    first,
                    count,
                    epoch,
                    number,
                    (at - _EPOCH) // _MICROSECOND,
                    original(thread_id),
                    conversation,
                    packed,
                )
                after = first

    async def records(self, stream: StoredStream) -> list[StoredRecord]:
        rows = await self._db.fetch(
            "SELECT kind, key, value FROM steward.record WHERE stream = $1", stream.row
        )
        return [StoredRecord(kind, original(key), value) for kind, key, value in rows]

    async def threads(self, stream: StoredStream) -> list[StoredThread]:
        rows = await self._db.fetch(
            "SELECT thread_id, sequence, titled, value FROM steward.thread WHERE stream = $1",
            stream.row,
        )
        return [
            StoredThread(original(key), sequence, with_first_title(titled, value))
            for key, sequence, titled, value in rows
        ]

    async def adopt(self, log_id: str) -> None:
        await self._db.execute("UPDATE steward.meta SET log_id = $1", log_id)
        self.log_id = log_id

    async def write(
        self,
        stream: StoredStream,
        chunks: AsyncIterator[StoredChunk],
        records: Sequence[StoredRecord],
        threads: Sequence[StoredThread],
    ) -> None:
        """As in the port. Each append gets a time of its own, since equal ones go together."""
        db = self._db
        tenant = stored(stream.user.tenant)
        async with db.transaction():
            await db.execute(_ONE, tenant)
            row, fewer = await self._clear(stream)
            events = -fewer
            append: tuple[int, int] | None = None
            at_us = 0
            waiting: list[tuple[object, ...]] = []
            async for chunk in chunks:
                if (chunk.epoch, chunk.number) != append:
                    append = (chunk.epoch, chunk.number)
                    at_us = max(chunk.at_us, at_us + 1)
                events += chunk.events
                at = _EPOCH + timedelta(microseconds=at_us)
                waiting.append(
                    (
                        tenant,
                        row,
                        chunk.first,
                        chunk.events,
                        chunk.epoch,
                        at,
                        stored(chunk.thread_id),
                        chunk.conversation,
                        chunk.packed,
                    )
                )
                if len(waiting) == ROWS:
                    await self._insert("chunk", 9, waiting)
                    waiting = []
            await self._insert("chunk", 9, waiting)
            await self._insert(
                "record", 5, [(tenant, row, kind, stored(k), value) for kind, k, value in records]
            )
            await self._insert(
                "thread",
                6,
                [
                    (tenant, row, stored(key), sequence, value if has_title(value) else None, value)
                    for key, sequence, value in threads
                ],
            )
            await db.execute("UPDATE steward.total SET events = events + $1 WHERE slot = 0", events)

    async def _insert(self, table: str, width: int, rows: list[tuple[object, ...]]) -> None:
        if rows:
            values = ", ".join(f"${n}" for n in range(1, width + 1))
            await self._db.executemany(f"INSERT INTO steward.{table} VALUES ({values})", rows)

    async def _clear(self, stream: StoredStream) -> tuple[int, int]:
        """The stream's row with nothing in it, and how many events are gone by this."""
        db = self._db
        values = (
            *map(stored, stream.user),
            stream.stream_id,
            stream.fence,
            stored(stream.activation),
            stream.oldest,
            stream.next,
            stream.number,
        )
        known = await self.stream(stream.user)
        if known is None:
            row: int = await db.fetchval(
                "INSERT INTO steward.stream (tenant, user_id, stream_id, fence, activation,"
                " oldest, next, number) VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING id",
                *values,
            )
            await db.execute("UPDATE steward.total SET streams = streams + 1 WHERE slot = 0")
            return row, 0
        fewer: int = await db.fetchval(
            "SELECT coalesce(sum(count), 0) FROM steward.chunk WHERE stream = $1", known.row
        )
        for table in ("chunk", "record", "thread"):
            await db.execute(f"DELETE FROM steward.{table} WHERE stream = $1", known.row)
        await db.execute(
            "UPDATE steward.stream SET stream_id = $3, fence = $4, activation = $5, oldest = $6,"
            " next = $7, number = $8 WHERE tenant = $1 AND user_id = $2",
            *values,
        )
        return known.row, fewer

    async def findings(self) -> list[str]:
        found: list[str] = []
        for what, table in _COUNTS.items():
            number = await self._db.fetchval(
                f"SELECT count(*) FROM {table} t WHERE NOT EXISTS"
                " (SELECT FROM steward.stream s WHERE s.id = t.stream AND s.tenant = t.tenant)"
            )
            if number:
                found.append(f"{number} {what} of its tenant")
        return found


def _stream(row: Any) -> StoredStream:
    id_, tenant, user, stream_id, fence, activation, *rest = row
    key = UserKey(original(tenant), original(user))
    return StoredStream(id_, key, stream_id, fence, original(activation), *rest)
