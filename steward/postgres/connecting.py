"""Connections to a PostgreSQL database: how they are made, and what their errors mean.

A service makes a subclass of `Database` that says how its database is called in errors. What a
connection is used for, and what is done again after an error, is the service's own decision.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import asyncpg

from steward.runtime.service import EnvironmentUnusable

CONNECT_S = 5.0
PREPARE_S = 300.0
"""For migrations, of this process or of another one that is waited for."""
FIRST_BACKOFF_S, MOST_BACKOFF_S = 0.05, 1.0
OLDEST_SERVER = 14

_ADVICE = "CREATE ROLE steward LOGIN PASSWORD '...'; ALTER DATABASE ... OWNER TO steward"

_PASSING_CLASSES = ("08", "40", "53", "57", "58")
"""Connection lost, rolled back, out of resources, stopped by an operator, system error."""
_PASSING_STATES = frozenset({"25006", "55P03", "28P01", "28000"})
"""A server that became a standby; a lock that was not to be had; a changing password."""
_MISTAKES = frozenset({"3D000", "28P01", "28000"})


Prepared = TypeVar("Prepared")


@dataclass(frozen=True, slots=True)
class Use:
    """What a database is to the service that connects: `what` and `setting` are for errors."""

    what: str
    setting: str
    application: str
    """The name that the server's list of sessions shows."""


@dataclass(frozen=True, slots=True)
class Database:
    """Which database, and how to talk to it. `pooled`: through PgBouncer in transaction mode."""

    USE: ClassVar[Use]

    url: str
    pooled: bool = False

    async def connect(self) -> asyncpg.Connection:
        """One connection. Raises what `is_passing` judges."""
        return await asyncpg.connect(
            self.url,
            timeout=CONNECT_S,
            # A pooler gives each transaction another session: nothing prepared is found again.
            statement_cache_size=0 if self.pooled else 100,
            server_settings=None if self.pooled else {"application_name": self.USE.application},
        )

    async def prepare(
        self,
        is_away: Callable[[BaseException], None],
        work: Callable[[asyncpg.Connection], Awaitable[Prepared]],
    ) -> Prepared:
        """Wait until the database answers, check it, and do `work` on a connection, as a whole.

        Tells `is_away` why not yet. Raises EnvironmentUnusable for a URL, server, database or role
        that can't be used, and what `work` raises and does not pass by itself.
        """
        backoff = Backoff()
        while True:
            try:
                async with self._checked(PREPARE_S) as connection:
                    return await work(connection)
            except Exception as error:
                if not is_passing(error):
                    raise
                is_away(error)
            await backoff.pause()

    async def examine(self) -> str:
        """Connect once and check what `prepare` checks; the server's version.

        Raises EnvironmentUnusable for what can't be used, OSError and TimeoutError for no answer.
        """
        try:
            async with self._checked(CONNECT_S) as connection:
                version = connection.get_server_version()
                return f"PostgreSQL {version.major}.{version.minor}"
        except asyncpg.PostgresError as error:
            raise EnvironmentUnusable(self.away(error)) from None

    @asynccontextmanager
    async def _checked(self, within_s: float) -> AsyncIterator[asyncpg.Connection]:
        """A first connection to a database that can be trusted, for so long."""
        connection = await self._connect_first()
        try:
            async with asyncio.timeout(within_s):
                # A pooler keeps us on one session for a transaction only.
                async with connection.transaction():
                    await self._check(connection)
                yield connection
        finally:
            connection.terminate()

    async def _connect_first(self) -> asyncpg.Connection:
        try:
            return await self.connect()
        except Exception as error:
            wrong = self._mistake(error)
            if wrong is None:
                raise
            raise wrong from None

    def away(self, error: BaseException) -> str:
        """Why nothing can be done, for people."""
        if isinstance(error, asyncpg.InterfaceError) and error.__context__ is not None:
            # The end of a transaction that found its connection broken says nothing of why.
            error = error.__context__
        return f"{self.USE.what} is out of reach: {str(error) or type(error).__name__}"

    def _mistake(self, error: BaseException) -> EnvironmentUnusable | None:
        """The error for whoever set this up wrongly, when this is why a connection failed."""
        use = self.USE
        if isinstance(error, asyncpg.PostgresError) and error.sqlstate in _MISTAKES:
            return EnvironmentUnusable(f"{use.what} refuses: {error}; check {use.setting}")
        if isinstance(error, asyncpg.exceptions.ClientConfigurationError | ValueError):
            return EnvironmentUnusable(f"{use.setting} is no usable postgresql:// URL: {error}")
        return None

    async def _check(self, connection: asyncpg.Connection) -> None:
        """Raise EnvironmentUnusable for a server, database or role that can't be trusted."""
        version = connection.get_server_version()
        if version.major < OLDEST_SERVER:
            raise EnvironmentUnusable(
                f"PostgreSQL {version.major} is too old for {self.USE.what};"
                f" it needs {OLDEST_SERVER} or newer"
            )
        row = await connection.fetchrow(
            "SELECT rolname, rolsuper OR rolbypassrls AS free,"
            " current_setting('server_encoding') AS encoding,"
            " 'off' IN (current_setting('synchronous_commit'), current_setting('fsync')) AS early"
            " FROM pg_roles WHERE rolname = current_user"
        )
        assert row is not None, "everybody who is connected has a role"
        if row["free"]:
            raise EnvironmentUnusable(
                f"role {row['rolname']!r} is not bound by row-level security, so tenants would not"
                f" be kept apart; use a plain role that owns the database: {_ADVICE}"
            )
        if row["encoding"] != "UTF8":
            raise EnvironmentUnusable(
                f"{self.USE.what} is encoded in {row['encoding']}; make one in UTF8"
            )
        if row["early"]:
            raise EnvironmentUnusable(
                f"{self.USE.what} answers before it has stored (synchronous_commit or fsync is"
                " off); turn it on: what was acknowledged must not be lost"
            )


def is_passing(error: BaseException) -> bool:
    """Whether the database is merely out of reach, so that the same thing may work later."""
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        return state.startswith(_PASSING_CLASSES) or state in _PASSING_STATES
    if isinstance(error, asyncpg.InterfaceError):
        # The driver says so of a broken connection, and of values and settings that never work.
        return not isinstance(error, ValueError)
    return isinstance(error, OSError | TimeoutError | asyncio.TimeoutError)


def is_postgres(url: str) -> bool:
    """Whether the value of a setting names a PostgreSQL database."""
    return url.startswith(("postgresql://", "postgres://"))


class Backoff:
    """Growing pauses with jitter, for a database that is away."""

    def __init__(self) -> None:
        self._next_s = FIRST_BACKOFF_S

    async def pause(self) -> None:
        await asyncio.sleep(self._next_s * random.uniform(0.5, 1))
        self._next_s = min(2 * self._next_s, MOST_BACKOFF_S)
