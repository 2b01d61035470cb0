"""Bringing the tables of an event log up to date, and which log it is."""

import asyncpg

from agent_service.log.postgres.appending import SECOND
from agent_service.log.postgres.connecting import Database
from agent_service.log.postgres.migrations import FIRST
from steward.postgres import migrator

MIGRATIONS: tuple[str, ...] = (FIRST, SECOND)
"""From an empty schema to the present one; the version of a database is how many it had."""

SCHEMA = migrator.Schema("steward", 0x53_54_57_4C, MIGRATIONS)


async def migrate(connection: asyncpg.Connection) -> str:
    """Apply what is missing; returns the identity of the log. Raises EnvironmentUnusable."""
    await migrator.migrate(connection, SCHEMA, Database.USE)
    async with connection.transaction():
        log_id: str = await connection.fetchval("SELECT log_id FROM steward.meta")
    return log_id
