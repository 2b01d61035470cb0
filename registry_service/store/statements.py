"""Writing many rows with few statements.

Each step of a statement gives the interpreter away and has to win it back from the event loop,
which costs far more than the row. So rows go in large pieces: one step writes hundreds.
"""

import sqlite3
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

PIECES = (256, 32, 4, 1)
"""Rows in one statement: few sizes, so that SQLite finds each of them prepared."""


def insert_rows(
    db: sqlite3.Connection, into: str, columns: int, rows: Sequence[tuple[Any, ...]]
) -> None:
    """Insert rows in their order; `into` is the statement up to its VALUES.

    Raises sqlite3.Error.
    """
    first = 0
    for size in PIECES:
        while len(rows) - first >= size:
            values = tuple(chain.from_iterable(rows[first : first + size]))
            db.execute(_statement(into, columns, size), values)
            first += size


@cache
def _statement(into: str, columns: int, rows: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return f"{into} VALUES {', '.join([row] * rows)}"
