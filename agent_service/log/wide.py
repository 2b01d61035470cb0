"""Statements for many rows at once.

Each `sqlite3` step gives up the interpreter's lock, and one per row would let a busy event
loop stretch a commit a hundredfold.
"""

import sqlite3

_WIDEST = 256


class WideStatement:
    """A statement for many rows, run in powers of two so that few are prepared."""

    __slots__ = ("_before", "_behind", "_row", "_width", "values")

    def __init__(self, before: str, width: int, behind: str = "") -> None:
        self._before = before
        self._behind = behind
        self._width = width
        self._row = "(" + ",".join("?" * width) + ")"
        self.values: list[object] = []

    def run(self, connection: sqlite3.Connection) -> None:
        """Run it with all rows that `values` holds, one after another in it, and empty that."""
        at = 0
        left = len(self.values) // self._width
        while left:
            rows = min(_WIDEST, 1 << (left.bit_length() - 1))
            sql = self._before + ",".join([self._row] * rows) + self._behind
            end = at + rows * self._width
            connection.execute(sql, self.values[at:end])
            at = end
            left -= rows
        self.values.clear()
