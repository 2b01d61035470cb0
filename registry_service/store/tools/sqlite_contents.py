"""The registry's store of a data directory, at rest: under the lock that a registry would take."""

import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from registry_service.core.transactions import Hold
from registry_service.store.etcd_keys import (
    Keys,
    dump_hold,
    dump_node,
    dump_placement,
    dump_rows,
    dump_tomb,
    dump_violation,
    load_hold,
    load_node,
    load_placement,
    load_rows,
    load_tomb,
    load_violation,
)
from registry_service.store.ledger_table import LedgerTable
from registry_service.store.port import LedgerRow
from registry_service.store.schema import LEDGER, NODE, node_record
from registry_service.store.sqlite import CACHE_KIB, DATABASE, PAGE_BYTES
from registry_service.store.statements import insert_rows
from registry_service.store.tables import Tables
from registry_service.store.tools.contents import Entry, Header, Part
from registry_service.store.violation_table import COLUMNS, ViolationRow
from registry_service.store.witness import Witness, WitnessFile
from steward.model.keys import NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.model.violations import Severity
from steward.runtime.service import EnvironmentUnusable
from steward.runtime.store_tool import Step, StoreProblem

_KEYS = Keys("any")
_PIECE = 1_000
_COPIED = """
CREATE TABLE IF NOT EXISTS copied (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    header TEXT NOT NULL
)
"""
_TABLES = ("hold", "ledger", "ledger_part", "node", "placement", "tomb", "violation", "copied")
_HEADER = (
    "SELECT instance, term, generation, rev,"
    " ifnull((SELECT seq FROM sqlite_sequence WHERE name = 'ledger'), 0),"
    " ifnull((SELECT seq FROM sqlite_sequence WHERE name = 'violation'), 0),"
    " (SELECT total FROM violation_total WHERE severity = 'refusal'),"
    " (SELECT total FROM violation_total WHERE severity = 'breach')"
    " FROM meta, identity"
)
# By part: the columns of one entry.
_SELECT = {
    Part.HOLDS: "SELECT node_id, node_rev, pid FROM hold",
    Part.LEDGER: f"SELECT number, {LEDGER} FROM ledger ORDER BY number",
    Part.NODES: f"SELECT {NODE} FROM node",
    Part.PLACEMENTS: "SELECT tenant, user, epoch, node_id, node_rev, address FROM placement",
    Part.TOMBS: "SELECT nonce, node_id, node_rev, cause FROM tomb",
    Part.VIOLATIONS: f"SELECT number, {COLUMNS} FROM violation ORDER BY number",
}
_INSERT = {
    Part.HOLDS: ("INSERT INTO hold (node_id, node_rev, pid)", 3),
    Part.LEDGER: (f"INSERT INTO ledger (number, {LEDGER})", 12),
    Part.NODES: (f"INSERT INTO node ({NODE})", 10),
    Part.PLACEMENTS: (
        "INSERT INTO placement (tenant, user, epoch, node_id, node_rev, address)",
        6,
    ),
    Part.TOMBS: ("INSERT INTO tomb (nonce, node_id, node_rev, cause)", 4),
    Part.VIOLATIONS: (f"INSERT INTO violation (number, {COLUMNS})", 13),
}


class SqliteContents:
    """`Contents` of `<data>/registry.db`. `make`: whether one that is absent is made."""

    most_rows: int | None = None

    def __init__(self, data: Path, *, make: bool) -> None:
        self.name = f"sqlite:{data}"
        self._path = data / DATABASE
        self._make = make
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """As in the port. Raises EnvironmentUnusable while a registry has it."""
        if not self._make and not self._path.exists():
            raise StoreProblem(f"{self._path.parent} has no {DATABASE}")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = db = sqlite3.connect(self._path, timeout=0, isolation_level=None)
        try:
            db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            db.execute("BEGIN EXCLUSIVE")
            Tables(db, lambda: 0).create()
            db.execute(_COPIED)
            db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            why = "a registry process uses it; stop that one"
            raise EnvironmentUnusable(f"{self._path} can't be used: {why}") from None

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def _db(self) -> sqlite3.Connection:
        assert self._connection is not None, "opened before"
        return self._connection

    @property
    def header(self) -> Header | None:
        found = Header(*self._db.execute(_HEADER).fetchone())
        return found if found.term or found.used else None

    @property
    def copied_from(self) -> str:
        row = self._db.execute("SELECT header FROM copied").fetchone()
        header = self.header
        if row is None or header is None or row[0] != _noted(header):
            return ""
        return header.instance

    async def count(self) -> int:
        tables = ("hold", "ledger", "node", "placement", "tomb", "violation")
        return sum(
            self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables
        )

    async def entries(self) -> AsyncIterator[Entry]:
        for part in Part:
            for row in self._rows(_SELECT[part]):
                yield _entry(part, row)

    def _rows(self, sql: str) -> Iterator[tuple[Any, ...]]:
        cursor = self._db.execute(sql)
        while rows := cursor.fetchmany(_PIECE):
            yield from rows

    async def replace(self, header: Header, entries: AsyncIterator[Entry], step: Step) -> int:
        """In one transaction, and with the witness that belongs to it."""
        db = self._db
        written = first_row = 0
        db.execute("BEGIN IMMEDIATE")
        try:
            for table in _TABLES:
                db.execute(f"DELETE FROM {table}")
            pieces: dict[Part, list[tuple[Any, ...]]] = {part: [] for part in Part}
            async for entry in entries:
                row = _row(entry)
                if entry.part is Part.LEDGER:
                    first_row = first_row or row[0]
                piece = pieces[entry.part]
                piece.append(row)
                written += 1
                if len(piece) == _PIECE:
                    _insert(db, entry.part, piece)
                    step(_PIECE)
            for part, piece in pieces.items():
                step(len(piece))
                _insert(db, part, piece)
            LedgerTable(db).mark_from(first_row or header.ledger + 1)
            self._note(header)
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise
        witness = WitnessFile(self._path.with_name(self._path.name + ".witness"))
        witness.start(Witness(header.instance, header.term, header.generation, header.revision))
        witness.close()
        return written

    def _note(self, header: Header) -> None:
        db = self._db
        numbers = (header.revision, header.generation, header.term)
        db.execute("UPDATE meta SET rev = ?, generation = ?, term = ?", numbers)
        db.execute("UPDATE identity SET instance = ?", (header.instance,))
        db.execute("DELETE FROM sqlite_sequence WHERE name IN ('ledger', 'violation')")
        last = (("ledger", header.ledger), ("violation", header.violations))
        db.executemany("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", last)
        totals = ((header.refusals, "refusal"), (header.breaches, "breach"))
        db.executemany("UPDATE violation_total SET total = ? WHERE severity = ?", totals)
        db.execute("INSERT INTO copied VALUES (1, ?)", (_noted(header),))

    async def findings(self) -> list[str]:
        return [
            f"SQLite finds damage: {text}"
            for (text,) in self._db.execute("PRAGMA integrity_check(20)")
            if text != "ok"
        ]


def _noted(header: Header) -> str:
    fields = asdict(header)
    del fields["placements"]
    return orjson.dumps(fields).decode()


def _insert(db: sqlite3.Connection, part: Part, piece: list[tuple[Any, ...]]) -> None:
    into, columns = _INSERT[part]
    insert_rows(db, into, columns, piece)
    piece.clear()


def _entry(part: Part, row: Sequence[Any]) -> Entry:
    """A row of `_SELECT` as it is kept in etcd."""
    key, value = _kept(part, tuple(row))
    return Entry(part, key[len(_KEYS.prefix) + len(part) + 1 :], value)


def _kept(part: Part, row: tuple[Any, ...]) -> tuple[bytes, bytes]:
    match part:
        case Part.HOLDS:
            hold = Hold(NodeIncarnation(row[0], row[1]), row[2])
            return _KEYS.hold(hold.incarnation), dump_hold(hold)
        case Part.LEDGER:
            return _KEYS.row(row[0]), dump_rows([LedgerRow(*row)])
        case Part.NODES:
            record = node_record(row)
            return _KEYS.node(record.claim.node_id), dump_node(record)
        case Part.PLACEMENTS:
            placement = Placement(UserKey(row[0], row[1]), *row[2:])
            return _KEYS.placement(placement.user), dump_placement(placement)
        case Part.TOMBS:
            return _KEYS.tomb(row[0]), dump_tomb(NodeIncarnation(row[1], row[2]), row[3])
        case Part.VIOLATIONS:
            violation = ViolationRow(row[0], row[1], Severity(row[2]), *row[3:])
            return _KEYS.violation(violation.severity, violation.number), dump_violation(violation)


def _row(entry: Entry) -> tuple[Any, ...]:
    """The other way round."""
    value = entry.value
    match entry.part:
        case Part.HOLDS:
            hold = load_hold(value)
            return (*hold.incarnation, hold.pid)
        case Part.LEDGER:
            return tuple(asdict(load_rows(value)[0]).values())
        case Part.NODES:
            record = load_node(value)
            claim = record.claim
            return (
                *(claim.node_id, record.node_rev, claim.boot_id, claim.nonce, claim.address),
                *(claim.zone, claim.capacity, claim.version, claim.pid, record.draining),
            )
        case Part.PLACEMENTS:
            placement = load_placement(_KEYS.user_of(_KEYS.placements + entry.key), value)
            node = (placement.node_id, placement.node_rev, placement.address)
            return (*placement.user, placement.epoch, *node)
        case Part.TOMBS:
            incarnation, cause = load_tomb(value)
            return (_KEYS.nonce_of(_KEYS.tombs + entry.key), *incarnation, cause)
        case Part.VIOLATIONS:
            row = load_violation(value)
            return tuple(asdict(row).values())
