"""The audit in PostgreSQL: a copy of the ledger and of all violations, for SQL and for years.

The registry's store decides and keeps a bounded number of rows (all of the ledger in SQLite); this
copy decides nothing. It follows the store by number, as every watcher does, so it costs a
placement nothing, and goes on where it was after any restart of either side.

Guarantees: each row is there once, under its number; rows of before survive the loss of the
registry's store, which begins a new era. Nobody waits for this database, and none of its
errors ends the registry: while it is away, rows stay where they are.
Not guaranteed: rows that the store dropped before they could be copied; that is said in the log,
and their numbers are missing here. Usually a row is here half a second after it was made.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from registry_service.audit.schema import SCHEMA, Database
from registry_service.store.port import LedgerRow, PlacementStore
from registry_service.store.violation_table import ViolationRow
from registry_service.watch import Tail, Tails
from steward.postgres.connecting import Backoff, is_passing
from steward.postgres.migrator import migrate
from steward.postgres.texts import stored
from steward.telemetry.logs import fields

PAGE = 500
LINGER_S = 0.25
"""Between two looks, so that rows of a busy registry travel together."""
STATEMENT_S = 10.0
UNUSABLE_S = 60.0
"""Between two tries where an operator has to do something first."""
SWEEP_S = 3600.0
MOST_SWEPT = 10_000
"""Rows that are removed in one transaction."""

Row = LedgerRow | ViolationRow

_ALL = "SELECT set_config('steward.scope', 'all', true)"
_ERA = """
INSERT INTO steward_audit.era (cluster, era) VALUES ($1, $2)
ON CONFLICT (cluster) DO UPDATE SET era = EXCLUDED.era, since = now()
    WHERE steward_audit.era.era < EXCLUDED.era
"""
_USER = {"tenant": "text", "user_id": "text", "epoch": "bigint"}
_NODE = {"node_id": "text", "node_rev": "bigint"}
_WHY = {"evidence": "text", "traceparent": "text"}
_LEDGER = {
    **{"number": "bigint", "revision": "bigint", "at": "timestamptz", "kind": "text"},
    **{**_USER, **_NODE, "cause": "text", **_WHY},
}
_VIOLATION = {
    **{"number": "bigint", "at": "timestamptz", "severity": "text", "kind": "text"},
    **{**_USER, **_NODE, "reporter": "text", **_WHY, "count": "bigint"},
}
"""Columns and their types, in the order of `_columns`."""
_DO = "make the database of `registry.audit` usable; the registry itself goes on"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_log = logging.getLogger(__name__)


class _Copy:
    """One table and its copy. `last` is the number of the newest row that was copied."""

    def __init__(
        self,
        table: str,
        columns: Mapping[str, str],
        tail: Tail,
        read: Callable[[int, int], Awaitable[Sequence[Row]]],
    ) -> None:
        self.table = f"steward_audit.{table}"
        self.tail = tail
        self.read = read
        self.last = 0
        self._names = ", ".join(columns)
        given = ", ".join(f"${place}::{of}[]" for place, of in enumerate(columns.values(), 3))
        self._insert = (
            f"INSERT INTO {self.table} (cluster, era, {self._names})"
            f" SELECT $1, $2, u.* FROM unnest({given}) AS u ON CONFLICT DO NOTHING"
        )
        self._newest = (
            f"SELECT {self._names} FROM {self.table} WHERE cluster = $1 AND era = $2"
            " ORDER BY number DESC LIMIT 1"
        )
        self._sweep = (
            f"DELETE FROM {self.table} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {self.table}"
            " WHERE cluster = $1 AND at < $2 AND (era < $3 OR number < $4) LIMIT $5))"
        )

    async def resume(self, connection: asyncpg.Connection, cluster: str, era: int) -> bool:
        """Go on after the newest copy; False if the store's row of that number is another one."""
        newest = await connection.fetchrow(self._newest, cluster, era)
        self.last = 0
        if newest is None:
            return True
        self.last = newest["number"]
        if self.tail.last < self.last:
            return False
        kept = await self.read(self.last - 1, 1)
        # One that the store did not keep can't be compared: it has gone far past it.
        return not kept or kept[0].number != self.last or _columns(kept[0]) == tuple(newest)

    async def copy(self, connection: asyncpg.Connection, cluster: str, era: int) -> bool:
        """Copy the next page; whether more may follow at once."""
        if self.tail.last <= self.last:
            return False
        rows = await self.read(self.last, PAGE)
        if not rows:
            return False
        if rows[0].number > self.last + 1:
            missing = rows[0].number - self.last - 1
            _log.warning(
                "the store dropped rows before the audit had them",
                extra=fields(table=self.table, rows=missing),
            )
        columns = zip(*map(_columns, rows), strict=True)
        async with _whole(connection):
            await connection.execute(self._insert, cluster, era, *map(list, columns))
        self.last = rows[-1].number
        return len(rows) == PAGE

    async def sweep(
        self, connection: asyncpg.Connection, cluster: str, era: int, before: datetime
    ) -> bool:
        """Remove some rows from before a time, never the newest; whether there may be more."""
        async with _whole(connection):
            status = await connection.execute(
                self._sweep, cluster, before, era, self.last, MOST_SWEPT
            )
        return status == f"DELETE {MOST_SWEPT}"


class AuditMirror:
    """Copies what the store of this registry records, until `run` is cancelled."""

    def __init__(
        self, database: Database, cluster: str, store: PlacementStore, tails: Tails, days: float
    ) -> None:
        self._database = database
        self._cluster = cluster
        self._days = days
        self._era = 1
        self._swept_at = -SWEEP_S
        self._copies = (
            _Copy("ledger", _LEDGER, tails.ledger, store.ledger_after),
            _Copy("violation", _VIOLATION, tails.violations, store.violations),
        )

    async def run(self) -> None:
        """Follow the store. Ends by being cancelled alone."""
        backoff = Backoff()
        while True:
            connection: asyncpg.Connection | None = None
            try:
                await self._database.prepare(_is_away, _migrate)
                connection = await self._database.connect()
                await self._resume(connection)
                backoff = Backoff()
                while True:
                    await self._step(connection)
            except Exception as error:
                if is_passing(error):
                    _is_away(error)
                    await backoff.pause()
                else:
                    _log.error("the audit can't be kept", extra=fields(why=str(error), do=_DO))
                    await asyncio.sleep(UNUSABLE_S)
            finally:
                if connection is not None:
                    connection.terminate()

    async def _resume(self, connection: asyncpg.Connection) -> None:
        """Find where the copies are, and begin a new era if the store has another past."""
        async with asyncio.timeout(STATEMENT_S), _whole(connection):
            known = await connection.fetchval(
                "SELECT era FROM steward_audit.era WHERE cluster = $1", self._cluster
            )
            self._era = known or 1
            same = [
                await each.resume(connection, self._cluster, self._era) for each in self._copies
            ]
            if not all(same):
                self._era += 1
                _log.warning(
                    "the registry's store has another past than the audit: a new era begins",
                    extra=fields(era=self._era),
                )
                for each in self._copies:
                    each.last = 0
            await connection.execute(_ERA, self._cluster, self._era)

    async def _step(self, connection: asyncpg.Connection) -> None:
        """Copy all there is, and wait for more."""
        for each in self._copies:
            more = True
            while more:
                async with asyncio.timeout(STATEMENT_S):
                    more = await each.copy(connection, self._cluster, self._era)
        if self._days and time.monotonic() >= self._swept_at + SWEEP_S:
            await self._sweep(connection)
        await asyncio.sleep(LINGER_S)
        waiting = [
            asyncio.create_task(each.tail.beyond(each.last), name="audit-tail")
            for each in self._copies
        ]
        try:
            await asyncio.wait(waiting, timeout=SWEEP_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _sweep(self, connection: asyncpg.Connection) -> None:
        before = datetime.now(UTC) - timedelta(days=self._days)
        for each in self._copies:
            more = True
            while more:
                async with asyncio.timeout(STATEMENT_S):
                    more = await each.sweep(connection, self._cluster, self._era, before)
        self._swept_at = time.monotonic()


@asynccontextmanager
async def _whole(connection: asyncpg.Connection) -> AsyncIterator[None]:
    """One transaction that sees all tenants. A pooler gives the next one another session."""
    async with connection.transaction():
        await connection.execute(_ALL)
        yield


async def _migrate(connection: asyncpg.Connection) -> None:
    await migrate(connection, SCHEMA, Database.USE)


def _is_away(error: BaseException) -> None:
    _log.warning(
        "the audit waits for its database", extra=fields(why=str(error) or type(error).__name__)
    )


def _columns(row: Row) -> tuple[Any, ...]:
    """A row as its copy has it."""
    at = _EPOCH + timedelta(milliseconds=row.at_ms)
    user = (stored(row.tenant), stored(row.user), row.epoch, row.node_id, row.node_rev)
    evidence = (stored(row.evidence), row.traceparent)
    if isinstance(row, LedgerRow):
        return (row.number, row.revision, at, row.kind, *user, stored(row.cause), *evidence)
    reporter = stored(row.reporter)
    return (row.number, at, row.severity.value, row.kind, *user, reporter, *evidence, row.count)
