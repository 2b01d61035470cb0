"""Recorded violations: a table of the SQLite store, and its equal in memory.

A violation gets the next number, once, and keeps it. At most `keep` rows are kept: the oldest
refusals go first; breaches go only when there is nothing else, and then the log of this process
says so. The totals count all that were ever recorded, each by its `count`, and never go down.

The table is used on the store's writer thread, inside its transaction: `record` for each, then
`finish` once, which drops what is too much.
"""

import logging
import sqlite3
from bisect import bisect_right
from dataclasses import dataclass
from typing import Protocol

from steward.model.violations import Severity, Violation
from steward.telemetry.logs import fields

KEEP = 100_000

SCHEMA = """
CREATE TABLE IF NOT EXISTS violation (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms INTEGER NOT NULL,
    severity TEXT NOT NULL,
    kind TEXT NOT NULL,
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    node_id TEXT NOT NULL,
    node_rev INTEGER NOT NULL,
    reporter TEXT NOT NULL,
    evidence TEXT NOT NULL,
    traceparent TEXT NOT NULL,
    count INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS violation_severity ON violation (severity, number);
CREATE TABLE IF NOT EXISTS violation_total (
    severity TEXT PRIMARY KEY,
    total INTEGER NOT NULL
) WITHOUT ROWID;
INSERT OR IGNORE INTO violation_total (severity, total) VALUES ('refusal', 0), ('breach', 0);
"""

COLUMNS = (
    "at_ms, severity, kind, tenant, user, epoch, node_id, node_rev, reporter, evidence,"
    " traceparent, count"
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ViolationRow:
    """One recorded violation. `at_ms` is Unix time, for people; what does not apply is empty."""

    number: int
    at_ms: int
    severity: Severity
    kind: str
    tenant: str
    user: str
    epoch: int
    node_id: str
    node_rev: int
    reporter: str
    evidence: str
    traceparent: str
    count: int


def violation_row(number: int, at_ms: int, violation: Violation, reporter: str) -> ViolationRow:
    """The row of a violation that gets this number."""
    return ViolationRow(
        number,
        at_ms,
        violation.severity,
        violation.kind.value,
        *(violation.user or ("", "")),
        violation.epoch,
        *(violation.node or ("", 0)),
        reporter,
        violation.evidence,
        violation.traceparent,
        violation.count,
    )


@dataclass(frozen=True, slots=True)
class ViolationTotals:
    """How many were ever recorded, each counted by its `count`."""

    refusals: int
    breaches: int


class Violations(Protocol):
    """What a store needs of its violations."""

    @property
    def last(self) -> int:
        """The number of the newest one, ever; 0 when there was none."""
        ...

    def record(self, violation: Violation, reporter: str, at_ms: int) -> int:
        """Keep it; returns its number."""
        ...

    def finish(self) -> None:
        """End of a transaction: keep no more than the limit."""
        ...

    def read(
        self, after: int, limit: int, severity: Severity | None, newest: bool
    ) -> list[ViolationRow]:
        """Rows after a number, ascending: the first `limit` of them, or the newest."""
        ...

    def totals(self) -> ViolationTotals: ...


class ViolationTable:
    """The statements of one connection. `create`, then `start`, before anything else."""

    def __init__(self, connection: sqlite3.Connection, keep: int = KEEP) -> None:
        self._db = connection
        self._keep = keep
        self._last = 0
        self._kept = dict.fromkeys(Severity, 0)
        self._added = dict.fromkeys(Severity, 0)

    @property
    def last(self) -> int:
        return self._last

    def create(self) -> None:
        """Make what is missing, also in a store of before; inside the caller's transaction."""
        for statement in SCHEMA.split(";"):
            if statement.strip():
                self._db.execute(statement)

    def start(self) -> None:
        """Learn what is there."""
        row = self._db.execute(
            "SELECT seq FROM sqlite_sequence WHERE name = 'violation'"
        ).fetchone()
        self._last = row[0] if row is not None else 0
        kept = self._db.execute("SELECT severity, count(*) FROM violation GROUP BY severity")
        self._kept |= {Severity(severity): count for severity, count in kept}

    def record(self, violation: Violation, reporter: str, at_ms: int) -> int:
        tenant, user = violation.user or ("", "")
        node_id, node_rev = violation.node or ("", 0)
        severity = violation.severity
        cursor = self._db.execute(
            f"INSERT INTO violation ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                at_ms,
                severity.value,
                violation.kind.value,
                tenant,
                user,
                violation.epoch,
                node_id,
                node_rev,
                reporter,
                violation.evidence,
                violation.traceparent,
                violation.count,
            ),
        )
        assert cursor.lastrowid is not None
        self._last = cursor.lastrowid
        self._kept[severity] += 1
        self._added[severity] += violation.count
        return self._last

    def finish(self) -> None:
        for severity, added in self._added.items():
            if added:
                self._db.execute(
                    "UPDATE violation_total SET total = total + ? WHERE severity = ?",
                    (added, severity.value),
                )
                self._added[severity] = 0
        self._drop(Severity.REFUSAL)
        dropped = self._drop(Severity.BREACH)
        if dropped:
            _tell(dropped)

    def _drop(self, severity: Severity) -> int:
        too_many = min(sum(self._kept.values()) - self._keep, self._kept[severity])
        if too_many <= 0:
            return 0
        self._db.execute(
            "DELETE FROM violation WHERE number IN"
            " (SELECT number FROM violation WHERE severity = ? ORDER BY number LIMIT ?)",
            (severity.value, too_many),
        )
        self._kept[severity] -= too_many
        return too_many

    def read(
        self, after: int, limit: int, severity: Severity | None, newest: bool
    ) -> list[ViolationRow]:
        only = "" if severity is None else "AND severity = ?"
        parameters = (after, limit) if severity is None else (after, severity.value, limit)
        rows = self._db.execute(
            f"SELECT number, {COLUMNS} FROM violation WHERE number > ? {only}"
            f" ORDER BY number {'DESC' if newest else 'ASC'} LIMIT ?",
            parameters,
        ).fetchall()
        if newest:
            rows.reverse()
        return [ViolationRow(number, at, Severity(sev), *rest) for number, at, sev, *rest in rows]

    def totals(self) -> ViolationTotals:
        rows = self._db.execute("SELECT severity, total FROM violation_total").fetchall()
        totals = dict(rows)
        return ViolationTotals(totals[Severity.REFUSAL], totals[Severity.BREACH])


class MemoryViolations:
    """The same rules over a list; nothing here is durable."""

    def __init__(self, keep: int = KEEP) -> None:
        self._keep = keep
        self._last = 0
        self._rows: list[ViolationRow] = []
        self._totals = dict.fromkeys(Severity, 0)

    @property
    def last(self) -> int:
        return self._last

    def record(self, violation: Violation, reporter: str, at_ms: int) -> int:
        self._last += 1
        severity = violation.severity
        self._rows.append(violation_row(self._last, at_ms, violation, reporter))
        self._totals[severity] += violation.count
        return self._last

    def finish(self) -> None:
        while len(self._rows) > self._keep:
            refusals = (i for i, row in enumerate(self._rows) if row.severity is Severity.REFUSAL)
            index = next(refusals, None)
            if index is None:
                _tell(1)
                index = 0
            del self._rows[index]

    def read(
        self, after: int, limit: int, severity: Severity | None, newest: bool
    ) -> list[ViolationRow]:
        first = bisect_right(self._rows, after, key=lambda row: row.number)
        rows = [row for row in self._rows[first:] if severity is None or row.severity is severity]
        return rows[-limit:] if newest else rows[:limit]

    def totals(self) -> ViolationTotals:
        return ViolationTotals(self._totals[Severity.REFUSAL], self._totals[Severity.BREACH])


def _tell(dropped: int) -> None:
    _log.error(
        "recorded breaches were dropped: there are too many",
        extra=fields(
            dropped=dropped, do="raise registry.kept_violations, and look at what makes so many"
        ),
    )
