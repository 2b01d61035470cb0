"""The ledger in SQLite: rows in the order in which they were made, and marks to find a user's.

An index by user would write a page somewhere in the middle of a large tree for each placement,
which costs more than the placement. Instead each row's user leaves a mark of four bytes at the
row's place in a part of 256 rows, and who asks for the rows of a user searches the marks: 4 MB
for a million rows, some milliseconds. A mark may be that of another user too, so the row decides.

Used on the store's writer thread: `write` inside of its transaction, `read_ledger` outside.
"""

import sqlite3
from collections.abc import Iterator
from typing import Any
from zlib import crc32

from registry_service.store.port import LedgerRow
from registry_service.store.schema import LEDGER
from registry_service.store.statements import insert_rows
from steward.model.keys import UserKey

ROWS = 256
"""In one part."""
_MARK_BYTES = 4
_PART_BYTES = ROWS * _MARK_BYTES
_NOBODY = bytes(_MARK_BYTES)


class LedgerTable:
    """The rows of a transaction, until it ends. `start` comes before anything else."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        # The number of the newest row in the table.
        self.last = 0
        # Columns of `LEDGER`, and the user among them.
        self._rows: list[tuple[tuple[Any, ...], UserKey]] = []
        # The marks of the last part, as far as it is filled.
        self._marks = bytearray()

    def start(self) -> None:
        """Learn what is there, and mark rows of a version that had an index instead."""
        self._rows = []
        row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'ledger'").fetchone()
        last = row[0] if row is not None else 0
        part = self._db.execute(
            "SELECT part, marks FROM ledger_part ORDER BY part DESC LIMIT 1"
        ).fetchone()
        self.last, self._marks = 0, bytearray()
        if part is not None:
            number, marks = part
            self._marks = bytearray(marks) if len(marks) < _PART_BYTES else bytearray()
            self.last = number * ROWS + len(marks) // _MARK_BYTES
        if self.last < last:
            unmarked = self._db.execute(
                "SELECT tenant, user FROM ledger WHERE number > ? ORDER BY number", (self.last,)
            )
            self._mark([UserKey(tenant, user) for tenant, user in unmarked])
        self._db.execute("DROP INDEX IF EXISTS ledger_user")

    def mark_from(self, first: int) -> None:
        """Mark all rows anew, in a table whose first row is this one."""
        self._db.execute("DELETE FROM ledger_part")
        part = (first - 1) // ROWS
        self.last, self._marks = part * ROWS, bytearray()
        self._mark([UserKey("", "")] * (first - 1 - self.last))
        while rows := self._db.execute(
            "SELECT tenant, user FROM ledger WHERE number > ? ORDER BY number LIMIT 10000",
            (self.last,),
        ).fetchall():
            self._mark([UserKey(tenant, user) for tenant, user in rows])

    def add(self, row: tuple[Any, ...], user: UserKey) -> None:
        """Keep a row for the end of the transaction; a `user` without name is nobody."""
        self._rows.append((row, user))

    def write(self) -> None:
        """Insert the rows of this transaction, and their marks."""
        if not self._rows:
            return
        rows, self._rows = self._rows, []
        insert_rows(self._db, f"INSERT INTO ledger ({LEDGER})", 11, [row for row, _ in rows])
        self._mark([user for _, user in rows])

    def _mark(self, users: list[UserKey]) -> None:
        """Add the marks of the next rows."""
        parts: list[tuple[int, bytes]] = []
        for user in users:
            self._marks += _mark_of(user)
            self.last += 1
            if len(self._marks) == _PART_BYTES:
                parts.append(((self.last - 1) // ROWS, bytes(self._marks)))
                self._marks = bytearray()
        if self._marks:
            parts.append(((self.last - 1) // ROWS, bytes(self._marks)))
        insert_rows(self._db, "INSERT OR REPLACE INTO ledger_part (part, marks)", 2, parts)


def read_ledger(db: sqlite3.Connection, user: UserKey | None, limit: int) -> list[LedgerRow]:
    """The newest rows, of one user if given, newest first."""
    if user is None:
        found = db.execute(
            f"SELECT number, {LEDGER} FROM ledger ORDER BY number DESC LIMIT ?", (limit,)
        )
        return [LedgerRow(*row) for row in found]
    rows: list[LedgerRow] = []
    for number in _marked(db, _mark_of(user)):
        row = db.execute(
            f"SELECT number, {LEDGER} FROM ledger WHERE number = ? AND tenant = ? AND user = ?",
            (number, *user),
        ).fetchone()
        if row is not None:
            rows.append(LedgerRow(*row))
            if len(rows) == limit:
                break
    return rows


def _marked(db: sqlite3.Connection, mark: bytes) -> Iterator[int]:
    """Numbers of rows that have this mark, newest first."""
    parts = db.execute(
        "SELECT part, marks FROM ledger_part WHERE instr(marks, ?) > 0 ORDER BY part DESC", (mark,)
    )
    for part, marks in parts:
        for index in range(len(marks) // _MARK_BYTES - 1, -1, -1):
            if marks.startswith(mark, index * _MARK_BYTES):
                yield part * ROWS + index + 1


def read_ledger_after(db: sqlite3.Connection, number: int, limit: int) -> list[LedgerRow]:
    """The first rows after a number, ascending."""
    rows = db.execute(
        f"SELECT number, {LEDGER} FROM ledger WHERE number > ? ORDER BY number LIMIT ?",
        (number, limit),
    )
    return [LedgerRow(*row) for row in rows]


def _mark_of(user: UserKey) -> bytes:
    tenant, name = user
    if not name:
        return _NOBODY
    return crc32(f"{len(tenant)}:{tenant}{name}".encode()).to_bytes(_MARK_BYTES, "little")
