"""The bundled sales database: SQLite in memory, built from `sales.sql`, read-only for queries.

The database is made once per process and kept as the bytes of its file; each query
opens its own connection on a copy, so that no query can change what another one sees.
"""

import functools
import sqlite3
from contextlib import closing
from importlib import resources
from typing import Any

MAX_ROWS = 200
MAX_STEPS = 1_000_000
"""Steps of SQLite's machine after which a query is stopped."""

_ALLOWED = frozenset(
    (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
)


@functools.cache
def _image() -> bytes:
    script = resources.files("agent_service.agents").joinpath("sales.sql").read_text("utf-8")
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(script)
        return connection.serialize()


def query_sales(sql: str, parameters: list[Any] | None = None) -> list[dict[str, Any]]:
    """Rows of one SELECT over `sales(month, region, product, units, revenue)` as dicts.

    Raises sqlite3.Error for anything else, and for a query of over MAX_STEPS steps; ValueError
    for more than MAX_ROWS rows. Blocks for the time of the query.
    """
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(_image())
        connection.set_authorizer(_authorize)
        connection.set_progress_handler(lambda: 1, MAX_STEPS)
        cursor = connection.execute(sql, parameters or [])
        rows = cursor.fetchmany(MAX_ROWS + 1)
        if len(rows) > MAX_ROWS:
            raise ValueError(f"the query gives more than {MAX_ROWS} rows")
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in rows]


def _authorize(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY
