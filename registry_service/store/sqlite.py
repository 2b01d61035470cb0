"""The placement store on SQLite: for one machine, one registry process, one file.

WAL with synchronous=FULL, an exclusive lock for the life of the process, one writer
thread, one transaction per batch. What was answered is on disk. A second process is
refused by the lock; should a lock ever be lost, the term that every batch compares
stops the loser. A witness beside the file shows that an older copy was put back: then
the generation is raised before anything is served. It does not serve other readers:
operators ask the registry.
"""

import asyncio
import queue
import sqlite3
import threading
from asyncio import Future
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from registry_service.core.transactions import (
    Committed,
    Outcome,
    StoreOperation,
    StoreView,
    TermLost,
)
from registry_service.store.ledger_table import read_ledger, read_ledger_after
from registry_service.store.port import START, LedgerRow, StoreFailed, StoreMark
from registry_service.store.reading import read_placements
from registry_service.store.tables import Tables
from registry_service.store.violation_table import KEEP, ViolationRow, ViolationTotals
from registry_service.store.witness import WitnessFile, needed_generation
from steward.model.keys import Epoch, UserKey
from steward.model.placement import Placement
from steward.model.violations import Severity
from steward.runtime.service import EnvironmentUnusable

DATABASE = "registry.db"
CACHE_KIB = 32_768
PAGE_BYTES = 2_048
"""Of a new file. A new user costs a page in the middle of the table, however large it is."""
CHECKPOINT_PAGES = 8_192
"""16 MiB of WAL, which a start reads in a tenth of a second."""

T = TypeVar("T")


class SqliteStore:
    """A `PlacementStore` in the file `path`; `wall_ms` stamps rows of ledger and violations.

    The witness is in `<path>.witness`. A generation below `least_generation` is raised to it.
    """

    def __init__(
        self,
        path: Path,
        wall_ms: Callable[[], int],
        keep_violations: int = KEEP,
        least_generation: int = 0,
    ) -> None:
        self._path = path
        self._wall_ms = wall_ms
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._term = 0
        self._closed = False
        self._keep_violations = keep_violations
        self._least_generation = least_generation
        # Replaced by the writer thread after each COMMIT, as a whole.
        self._mark = START
        # Of the writer thread alone.
        self._connection: sqlite3.Connection | None = None
        self._tables: Tables | None = None
        self._witness = WitnessFile(path.with_name(path.name + ".witness"))

    async def open(self) -> StoreView:
        self._thread = threading.Thread(target=self._work, name="registry-store", daemon=True)
        self._thread.start()
        return await self._call(self._open)

    def commit(self, operations: tuple[StoreOperation, ...]) -> "Future[Outcome]":
        return self._call(lambda: self._commit(operations))

    @property
    def mark(self) -> StoreMark:
        return self._mark

    async def ledger(self, user: UserKey | None, limit: int) -> list[LedgerRow]:
        return await self._call(lambda: read_ledger(self._opened(), user, limit))

    async def ledger_after(self, number: int, limit: int) -> list[LedgerRow]:
        return await self._call(lambda: read_ledger_after(self._opened(), number, limit))

    async def placements(self, after: UserKey | None, limit: int, newest: Epoch) -> list[Placement]:
        return await self._call(lambda: read_placements(self._opened(), after, limit, newest))

    async def violations(
        self, after: int, limit: int, severity: Severity | None = None, newest: bool = False
    ) -> list[ViolationRow]:
        return await self._call(
            lambda: self._used().violations.read(after, limit, severity, newest)
        )

    async def violation_totals(self) -> ViolationTotals:
        return await self._call(lambda: self._used().violations.totals())

    async def close(self) -> None:
        if self._thread is None or self._closed:
            return
        closing = self._call(self._close)
        self._closed = True
        self._jobs.put(None)
        await closing

    # On the writer thread

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _call(self, work: Callable[[], T]) -> "Future[T]":
        """Run `work` on the writer thread, after all that was asked before."""
        loop = asyncio.get_running_loop()
        future: Future[T] = loop.create_future()
        if self._closed:
            future.set_exception(StoreFailed("the store is closed"))
            return future

        def job() -> None:
            try:
                result = work()
            except (sqlite3.Error, OSError) as error:
                failure = StoreFailed(f"{self._path}: {error}")
                self._post(loop, lambda: _fail(future, failure))
            except Exception as error:  # Also a bug: whoever waits must hear of it.
                refusal = error
                self._post(loop, lambda: _fail(future, refusal))
            else:
                self._post(loop, lambda: _succeed(future, result))

        self._jobs.put(job)
        return future

    @staticmethod
    def _post(loop: asyncio.AbstractEventLoop, done: Callable[[], None]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(done)

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreFailed(f"{self._path} is not open")
        return self._connection

    def _used(self) -> Tables:
        self._opened()
        assert self._tables is not None
        return self._tables

    def _open(self) -> StoreView:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(
                self._path, timeout=0, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise EnvironmentUnusable(f"{self._path} can't be opened: {error}") from None
        try:
            # Before the first use of the file: then WAL needs no shared memory either.
            connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            # New users are everywhere in the table: large stores need more than SQLite's 2 MiB,
            # and a page that many batches write is moved into the file once for all of them.
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            self._tables = tables = Tables(connection, self._wall_ms, self._keep_violations)
            connection.execute("BEGIN EXCLUSIVE")
            tables.create()
            witness = self._witness.read()
            least = self._least_generation
            generation, raised = needed_generation(tables.found(), witness, least)
            least_term = witness.term if witness is not None else 0
            self._term, view = tables.start(generation, raised, least_term)
            connection.execute("COMMIT")
            # Killed before this, the next one to start finds the file ahead of its witness.
            self._witness.start(tables.witness)
            self._mark = tables.mark
        except (OSError, ValueError) as error:
            connection.close()
            raise EnvironmentUnusable(f"{self._path} can't be served: {error}") from None
        except sqlite3.Error as error:
            connection.close()
            if "locked" in str(error):
                why = "another registry process uses it; stop that one, or use another --data"
            else:
                why = str(error)
            raise EnvironmentUnusable(f"{self._path} can't be used: {why}") from None
        self._connection = connection
        return view

    def _commit(self, operations: tuple[StoreOperation, ...]) -> Outcome:
        connection, tables = self._opened(), self._tables
        assert tables is not None
        connection.execute("BEGIN IMMEDIATE")
        try:
            term = tables.begin()
            if term != self._term:
                connection.execute("ROLLBACK")
                return TermLost(term)
            tables.expect(operations)
            results = tuple(tables.apply(operation) for operation in operations)
            revision = tables.finish()
            connection.execute("COMMIT")
            self._witness.write(tables.witness)
            self._mark = tables.mark
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise StoreFailed(f"{self._path}: {error}") from error
        return Committed(results, revision)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self._witness.close()


def _succeed(future: "Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "Future[T]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
