"""The auth store in SQLite: `<data>/auth.db`, opened by one process only.

WAL with synchronous=FULL: what was answered survives a crash of the machine. An
exclusive lock refuses a second process, since revocations are cached in memory. One
thread writes; what waits while it commits goes into the next transaction together.
Secrets are stored as digests alone, so a copy of the file opens no door.

An error of SQLite ends the store: every caller in and after it is refused, and the
process exits to be started again. That is rude and safe.
"""

import asyncio
import os
import sqlite3
from asyncio import Future
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from auth_service.core.grants import Grant
from auth_service.store.packing import pack, unpack
from auth_service.store.port import Change, Keep, StoreFailed, Take, Told
from steward.errors import Reason, StewardError
from steward.model.keys import UserKey
from steward.rpc.outbox import Outbox, OutboxClosed, OutboxFull
from steward.runtime.service import EnvironmentUnusable

SCHEMA_VERSION = 1
MOST_WAITING = 1024
"""Batches that may wait for the writer; more are refused."""

MOST_PER_COMMIT = 128
LOCK_WAIT_S = 2.0
CLOSE_WAIT_S = 5.0

_SCHEMA = """
CREATE TABLE one_use (
    digest BLOB PRIMARY KEY,
    expires_at_ms INTEGER NOT NULL,
    body BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX one_use_by_expiry ON one_use (expires_at_ms);
CREATE TABLE revocation (
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,
    issued_before_ms INTEGER NOT NULL,
    PRIMARY KEY (tenant, user)
) WITHOUT ROWID;
"""


class _Batch(NamedTuple):
    changes: Sequence[Change]
    now_ms: int
    done: "Future[list[Grant | None]]"


class SqliteAuthStore:
    """An `AuthStore` over one SQLite file."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises EnvironmentUnusable when another process holds it."""
        self._database = _open(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="auth-store")
        self._waiting: Outbox[_Batch] = Outbox(MOST_WAITING)
        self._failed = asyncio.Event()
        self._writer = asyncio.get_running_loop().create_task(self._write(), name="auth-store")

    async def follow(self, told: Told) -> None:
        loop = asyncio.get_running_loop()
        told(await loop.run_in_executor(self._thread, self._read_marks))

    def unsure(self) -> str | None:
        return None

    async def apply(self, changes: Sequence[Change], now_ms: int) -> list[Grant | None]:
        done: Future[list[Grant | None]] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put(_Batch(changes, now_ms, done))
        except OutboxFull:
            raise StewardError(Reason.STORE_UNAVAILABLE, "too much waits; try again") from None
        except OutboxClosed:
            raise StoreFailed("the store is closed") from None
        return await done

    async def failed(self) -> None:
        await self._failed.wait()

    async def close(self) -> None:
        self._waiting.close()
        await asyncio.wait({self._writer}, timeout=CLOSE_WAIT_S)
        self._thread.shutdown(wait=self._writer.done())
        if self._writer.done():
            self._database.close()

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        failure: StoreFailed | None = None
        while batches := await self._waiting.take(MOST_PER_COMMIT):
            if failure is None:
                try:
                    results = await loop.run_in_executor(self._thread, self._commit, batches)
                except sqlite3.Error as error:
                    failure = StoreFailed(f"auth.db: {error}")
                    self._failed.set()
                    self._waiting.close()
            for index, batch in enumerate(batches):
                # A caller whose stream ended meanwhile has cancelled its future.
                if batch.done.done():
                    continue
                if failure is None:
                    batch.done.set_result(results[index])
                else:
                    batch.done.set_exception(failure)

    def _commit(self, batches: list[_Batch]) -> list[list[Grant | None]]:
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        try:
            now_ms = max(batch.now_ms for batch in batches)
            database.execute("DELETE FROM one_use WHERE expires_at_ms <= ?", (now_ms,))
            results = [[self._change(change) for change in batch.changes] for batch in batches]
            database.execute("COMMIT")
        except BaseException:
            # Some errors have ended the transaction already.
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        return results

    def _change(self, change: Change) -> Grant | None:
        database = self._database
        if isinstance(change, Keep):
            database.execute(
                "INSERT INTO one_use (digest, expires_at_ms, body) VALUES (?, ?, ?)",
                (change.digest, change.grant.expires_at_ms, pack(change.grant)),
            )
            return None
        if isinstance(change, Take):
            rows = database.execute(
                "DELETE FROM one_use WHERE digest = ? RETURNING body", (change.digest,)
            ).fetchall()
            return unpack(rows[0][0]) if rows else None
        database.execute(
            "INSERT INTO revocation (tenant, user, issued_before_ms) VALUES (?, ?, ?)"
            " ON CONFLICT DO UPDATE SET"
            " issued_before_ms = max(issued_before_ms, excluded.issued_before_ms)",
            (change.user.tenant, change.user.user, change.issued_before_ms),
        )
        return None

    def _read_marks(self) -> dict[UserKey, int]:
        rows = self._database.execute("SELECT tenant, user, issued_before_ms FROM revocation")
        return {UserKey(tenant, user): mark for tenant, user, mark in rows}


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite would make the file with the process' umask; its WAL takes over this mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        database = sqlite3.connect(
            path, timeout=LOCK_WAIT_S, isolation_level=None, check_same_thread=False
        )
    except (OSError, sqlite3.Error) as error:
        raise EnvironmentUnusable(f"{path}: {error}; make it writable") from None
    try:
        # Before the first access: the lock is then held until the connection is closed.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("BEGIN EXCLUSIVE")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise EnvironmentUnusable(f"{path} is of schema {version}, not {SCHEMA_VERSION}")
        database.execute("COMMIT")
    except sqlite3.OperationalError as error:
        database.close()
        if error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise EnvironmentUnusable(f"{path} is in use by another auth process") from None
        raise EnvironmentUnusable(f"{path}: {error}") from None
    except sqlite3.DatabaseError as error:
        database.close()
        raise EnvironmentUnusable(f"{path}: {error}; restore it, or move it away") from None
    except EnvironmentUnusable:
        database.close()
        raise
    return database
