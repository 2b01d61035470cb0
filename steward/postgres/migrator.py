"""Bringing the tables of a service up to date: once, under a lock, in place.

A schema belongs to one service, and its version is how many migrations it had. A migration that
was released is never edited: later ones follow it.
"""

from dataclasses import dataclass

import asyncpg

from steward.postgres.connecting import Use
from steward.runtime.service import EnvironmentUnusable


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables of a service, as numbered migrations from nothing to the present ones."""

    name: str
    lock: int
    """Whoever migrates holds this advisory lock; others wait and then find nothing to do."""
    migrations: tuple[str, ...]


async def migrate(connection: asyncpg.Connection, schema: Schema, use: Use) -> None:
    """Apply what is missing, in one transaction.

    Raises EnvironmentUnusable when the role may not, or when the database is of a newer version.
    """
    try:
        async with connection.transaction():
            await connection.execute(f"SELECT pg_advisory_xact_lock({schema.lock})")
            await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema.name}")
            await connection.execute(
                f"CREATE TABLE IF NOT EXISTS {schema.name}.version"
                " (number int PRIMARY KEY, at timestamptz NOT NULL DEFAULT now())"
            )
            had = await connection.fetchval(f"SELECT max(number) FROM {schema.name}.version") or 0
            if had > len(schema.migrations):
                raise EnvironmentUnusable(
                    f"{use.what} has version {had}, and this program knows"
                    f" {len(schema.migrations)}; install the newer program"
                )
            for number, migration in enumerate(schema.migrations[had:], had + 1):
                await connection.execute(migration)
                await connection.execute(f"INSERT INTO {schema.name}.version VALUES ($1)", number)
    except asyncpg.InsufficientPrivilegeError as error:
        raise EnvironmentUnusable(
            f"{use.what} does not let its role make tables: {error}; make the role its owner"
        ) from None
