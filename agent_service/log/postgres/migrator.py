"""Bringing the tables of an event log up to date: once, under a lock, in place."""

import asyncpg

from agent_service.log.postgres.migrations import MIGRATIONS
from steward.runtime.service import EnvironmentUnusable

_LOCK = 0x53_54_57_4C
"""Whoever migrates holds this advisory lock; the others wait and then find nothing to do."""


async def migrate(connection: asyncpg.Connection) -> str:
    """Apply what is missing, in one transaction; returns the identity of the log.

    Raises EnvironmentUnusable when the role may not, or when the database is of a newer version.
    """
    try:
        async with connection.transaction():
            await connection.execute(f"SELECT pg_advisory_xact_lock({_LOCK})")
            await connection.execute("CREATE SCHEMA IF NOT EXISTS steward")
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS steward.version"
                " (number int PRIMARY KEY, at timestamptz NOT NULL DEFAULT now())"
            )
            had = await connection.fetchval("SELECT max(number) FROM steward.version") or 0
            if had > len(MIGRATIONS):
                raise EnvironmentUnusable(
                    f"the event log's database has version {had}, and this program knows"
                    f" {len(MIGRATIONS)}; install the newer program"
                )
            for number, migration in enumerate(MIGRATIONS[had:], had + 1):
                await connection.execute(migration)
                await connection.execute("INSERT INTO steward.version VALUES ($1)", number)
            log_id: str = await connection.fetchval("SELECT log_id FROM steward.meta")
    except asyncpg.InsufficientPrivilegeError as error:
        raise EnvironmentUnusable(
            f"the event log's database does not let its role make tables: {error};"
            " make the role its owner"
        ) from None
    return log_id
