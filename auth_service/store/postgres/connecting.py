"""Which PostgreSQL database an auth store is in."""

from dataclasses import dataclass
from typing import Any, ClassVar

import asyncpg

from steward.postgres import connecting
from steward.postgres.connecting import Use


@dataclass(frozen=True, slots=True)
class Database(connecting.Database):
    """The database of an auth store."""

    USE: ClassVar[Use] = Use("the auth store's database", "auth.store", "steward-auth")

    async def ask(self, connection: asyncpg.Connection, sql: str, *arguments: Any) -> list[Any]:
        """The rows of one statement, which is a transaction and may be repeated."""
        if not self.pooled:
            return list(await connection.fetch(sql, *arguments))
        # A pooler keeps us on one session for a transaction only.
        async with connection.transaction():
            return list(await connection.fetch(sql, *arguments))
