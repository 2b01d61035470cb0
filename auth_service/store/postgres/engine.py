"""The auth store in PostgreSQL: any number of auth processes on one database.

Each batch is one transaction. A secret is handed out by deleting its row, which one transaction
can. A batch whose answer was lost is not asked again: what it took stays taken, and a late
copy of what it kept must not open a door twice. Only revocations are repeated.

While the database is away batches wait for a bound and are refused, and `unsure` says why; it all
goes on by itself when the database is back. How processes learn of each other's revocations, and
what a revocation waits for: `feed.py`. Within a batch secrets are kept before others are taken.
"""

import asyncio
import logging
from asyncio import Future
from collections.abc import Sequence
from typing import Any

import asyncpg

from auth_service.core.grants import Grant
from auth_service.store.packing import pack, unpack
from auth_service.store.port import Change, Keep, Mark, StoreFailed, Take, Told
from auth_service.store.postgres.connecting import Database
from auth_service.store.postgres.feed import MOST_MARKS, SURE_S, Feed
from auth_service.store.postgres.migrations import SCHEMA
from steward.errors import Reason, StewardError
from steward.model.keys import UserKey
from steward.postgres.connecting import Backoff, is_passing
from steward.postgres.migrator import migrate
from steward.postgres.texts import stored
from steward.runtime.clock import boot_ms

WAIT_S = 2.5
"""The longest that a batch waits and works; edges wait a little longer."""
CLOSE_S = 3.0
MOST_WAITING = 1024
"""Batches that may wait; more are refused."""

_APPLY = "SELECT * FROM steward_auth.apply_v1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"

_logger = logging.getLogger("steward.auth")


class _Batch:
    """Changes, the arguments that ask for them, and who waits."""

    __slots__ = ("arguments", "asked", "changes", "deadline", "done", "marks")

    def __init__(self, changes: Sequence[Change], now_ms: int) -> None:
        loop = asyncio.get_running_loop()
        self.changes = changes
        self.arguments = _arguments(changes, now_ms)
        self.marks = [isinstance(change, Mark) for change in changes]
        self.deadline = loop.time() + WAIT_S
        self.done: Future[list[Grant | None]] = loop.create_future()
        self.asked = False
        """Its commit was asked for, and may have happened."""

    @property
    def open(self) -> bool:
        """Whether it may be asked for, for the first time or again."""
        return not self.asked or all(self.marks)

    def settle(self, results: list[Grant | None]) -> None:
        # A caller whose stream ended meanwhile has cancelled its future.
        if not self.done.done():
            self.done.set_result(results)

    def refuse(self, error: Exception) -> None:
        """Without effect when it has an answer, or nobody waits."""
        if not self.done.done():
            self.done.set_exception(error)


class PostgresAuthStore:
    """An `AuthStore` over a PostgreSQL database; `open` before all else."""

    def __init__(self, database: Database, *, lanes: int = 4) -> None:
        """Of `lanes` batches each is under way on a connection of its own."""
        self._database = database
        self._feed = Feed(database)
        self._number = lanes
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: asyncio.Queue[_Batch] = asyncio.Queue(MOST_WAITING)
        self._failure: StoreFailed | None = None
        self._failed = asyncio.Event()
        self._closed = False

    async def open(self) -> None:
        """Wait for the database and bring its tables up to date.

        Raises EnvironmentUnusable for a database, role or URL that can't be used.
        """
        use = self._database.USE
        await self._database.prepare(
            self._feed.is_away, lambda connection: migrate(connection, SCHEMA, use)
        )
        self._tasks = [asyncio.create_task(self._lane()) for _ in range(self._number)]

    async def follow(self, told: Told) -> None:
        known = asyncio.Event()
        self._tasks.append(asyncio.create_task(self._follow(told, known)))
        await known.wait()
        if self._failure is not None:
            raise self._failure

    def unsure(self) -> str | None:
        return self._feed.unsure()

    async def apply(self, changes: Sequence[Change], now_ms: int) -> list[Grant | None]:
        if self._failure is not None or self._closed:
            raise self._failure or StoreFailed("the auth store is closed")
        batch = _Batch(changes, now_ms)
        try:
            self._waiting.put_nowait(batch)
        except asyncio.QueueFull:
            raise StewardError(Reason.STORE_UNAVAILABLE, "too much waits; try again") from None
        results = await batch.done
        if any(batch.marks):
            # Whoever was sure before the commit, and has heard nothing since, no longer is.
            await asyncio.sleep(SURE_S)
        return results

    async def failed(self) -> None:
        await self._failed.wait()

    async def close(self) -> None:
        self._closed = True
        try:
            async with asyncio.timeout(CLOSE_S):
                if self._tasks:
                    await self._waiting.join()
        except TimeoutError:
            _logger.warning("auth store closed with changes that had no answer")
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        while not self._waiting.empty():
            self._waiting.get_nowait().refuse(StoreFailed("the auth store is closed"))

    async def _follow(self, told: Told, known: asyncio.Event) -> None:
        try:
            await self._feed.run(told, known)
        except Exception as error:
            self._fail(error)
            known.set()

    async def _lane(self) -> None:
        """Take what waits and make it durable, one batch after another."""
        connection: asyncpg.Connection | None = None
        try:
            while True:
                batch = await self._waiting.get()
                try:
                    if not batch.done.done():
                        connection = await self._serve(batch, connection)
                finally:
                    # When this task is ended, too, nobody is left without an answer.
                    batch.refuse(StoreFailed("the auth store is closed"))
                    self._waiting.task_done()
        finally:
            if connection is not None:
                connection.terminate()

    async def _serve(
        self, batch: _Batch, connection: asyncpg.Connection | None
    ) -> asyncpg.Connection | None:
        """Settle a batch by its deadline; returns the connection if it is still good."""
        backoff = Backoff()
        try:
            async with asyncio.timeout_at(batch.deadline):
                while batch.open and self._failure is None:
                    try:
                        if connection is None or connection.is_closed():
                            connection = await self._database.connect()
                        batch.settle(await self._commit(connection, batch))
                        return connection
                    except BaseException as error:
                        # How far this connection is, nobody knows.
                        if connection is not None:
                            connection.terminate()
                            connection = None
                        if not isinstance(error, Exception):
                            raise
                        if not is_passing(error):
                            self._fail(error)
                    await backoff.pause()
        except TimeoutError:
            pass
        text = "the auth store's database did not answer; try again"
        batch.refuse(self._failure or StewardError(Reason.STORE_UNAVAILABLE, text))
        return None

    async def _commit(self, connection: asyncpg.Connection, batch: _Batch) -> list[Grant | None]:
        """One transaction; notes in the batch from when on it may have been done."""
        began_ms = boot_ms()
        arguments = (*batch.arguments, *self._feed.place, MOST_MARKS)
        if self._database.pooled:
            # A pooler keeps us on one session for a transaction only.
            transaction = connection.transaction()
            await transaction.start()
            rows = await connection.fetch(_APPLY, *arguments)
            batch.asked = True
            await transaction.commit()
        else:
            batch.asked = True
            rows = await connection.fetch(_APPLY, *arguments)
        bodies = {row["taken"]: row["body"] for row in rows if row["taken"] is not None}
        if not self._feed.learn([row for row in rows if row["taken"] is None], began_ms):
            await self._feed.learn_all(connection)
        results: list[Grant | None] = []
        for change in batch.changes:
            body = bodies.pop(change.digest, None) if isinstance(change, Take) else None
            results.append(None if body is None else unpack(body))
        return results

    def _fail(self, error: Exception) -> None:
        """Whatever it was, this program and that database don't fit: the process has to end."""
        if self._failure is None:
            _logger.critical("auth store failed for good: %s", error)
            self._failure = StoreFailed(f"the auth store failed: {error}")
            self._failed.set()


def _arguments(changes: Sequence[Change], now_ms: int) -> list[Any]:
    """The columns of `apply_v1`. The highest mark of a user stands for all of them."""
    keeps = [change for change in changes if isinstance(change, Keep)]
    marks: dict[UserKey, int] = {}
    for change in changes:
        if isinstance(change, Mark):
            marks[change.user] = max(marks.get(change.user, 0), change.issued_before_ms)
    return [
        [keep.digest for keep in keeps],
        [keep.grant.expires_at_ms for keep in keeps],
        [pack(keep.grant) for keep in keeps],
        [change.digest for change in changes if isinstance(change, Take)],
        now_ms,
        [stored(user.tenant) for user in marks],
        [stored(user.user) for user in marks],
        list(marks.values()),
    ]
