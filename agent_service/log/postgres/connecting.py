"""Connections to the PostgreSQL of an event log: how they are made, and what their errors mean."""

import asyncio
from dataclasses import dataclass

import asyncpg

from steward.runtime.service import EnvironmentUnusable

CONNECT_S = 5.0
_ADVICE = "CREATE ROLE steward LOGIN PASSWORD '...'; ALTER DATABASE ... OWNER TO steward"

_PASSING_CLASSES = ("08", "40", "53", "57", "58")
"""Connection lost, rolled back, out of resources, stopped by an operator, system error."""
_PASSING_STATES = frozenset({"25006", "55P03", "28P01", "28000"})
"""A server that became a standby; a lock that was not to be had; a changing password."""
_MISTAKES = frozenset({"3D000", "28P01", "28000"})


@dataclass(frozen=True, slots=True)
class Database:
    """Which database, and how to talk to it. `pooled`: through PgBouncer in transaction mode."""

    url: str
    pooled: bool = False

    async def connect(self) -> asyncpg.Connection:
        """One connection. Raises what `is_passing` judges."""
        return await asyncpg.connect(
            self.url,
            timeout=CONNECT_S,
            # A pooler gives each transaction another session: nothing prepared is found again.
            statement_cache_size=0 if self.pooled else 100,
            server_settings=None if self.pooled else {"application_name": "steward-log"},
        )


def is_passing(error: BaseException) -> bool:
    """Whether the database is merely out of reach, so that the same thing may work later."""
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        return state.startswith(_PASSING_CLASSES) or state in _PASSING_STATES
    return isinstance(error, OSError | TimeoutError | asyncpg.InterfaceError | asyncio.TimeoutError)


def mistake(error: BaseException) -> EnvironmentUnusable | None:
    """The error for whoever set this up wrongly, when this is why a first connection failed."""
    if isinstance(error, asyncpg.PostgresError) and error.sqlstate in _MISTAKES:
        return EnvironmentUnusable(f"the event log's database refuses: {error}; check log.store")
    if isinstance(error, asyncpg.exceptions.ClientConfigurationError | ValueError):
        return EnvironmentUnusable(f"log.store is no usable postgresql:// URL: {error}")
    return None


async def check_server(connection: asyncpg.Connection) -> None:
    """Raise EnvironmentUnusable for a server, database or role that this log can't trust."""
    version = connection.get_server_version()
    if version.major < 14:
        raise EnvironmentUnusable(
            f"PostgreSQL {version.major} is too old for the event log; it needs 14 or newer"
        )
    row = await connection.fetchrow(
        "SELECT rolname, rolsuper OR rolbypassrls AS free, current_setting('server_encoding') AS e,"
        " current_setting('synchronous_commit') AS s, current_setting('fsync') AS f"
        " FROM pg_roles WHERE rolname = current_user"
    )
    assert row is not None, "everybody who is connected has a role"
    if row["free"]:
        raise EnvironmentUnusable(
            f"role {row['rolname']!r} is not bound by row-level security, so tenants would not be"
            f" kept apart; use a plain role that owns the database: {_ADVICE}"
        )
    if row["e"] != "UTF8":
        raise EnvironmentUnusable(f"the database is encoded in {row['e']}; make one in UTF8")
    if row["s"] == "off" or row["f"] == "off":
        raise EnvironmentUnusable(
            "the database answers before it has stored (synchronous_commit or fsync is off);"
            " turn it on: an event that was shown must not be lost"
        )
