"""Tables and statements of the SQLite store: the rules of the operations in SQL.

Used on the store's writer thread, inside a transaction that the store opens and ends.
`meta` has one row: `rev` grows by one per operation that changes something, so that an
epoch belongs to one placement; `term` says who may write.
"""

import sqlite3
from collections.abc import Callable
from typing import Any

from registry_service.core.transactions import (
    Done,
    DrainNode,
    FenceNode,
    JoinNode,
    NodeClaim,
    NodeJoined,
    NodeOccupied,
    NodeRecord,
    NonceSpent,
    PlacementRead,
    PlacementReleased,
    PlaceUser,
    ReadPlacement,
    RecordRefusal,
    ReleasePlacement,
    StoreOperation,
    StoreResult,
    StoreView,
    TargetRefused,
    UserPlaced,
)
from registry_service.store.port import LedgerRow, moved_from
from steward.model.keys import (
    Epoch,
    NodeId,
    NodeIncarnation,
    NodeRev,
    Revision,
    UserKey,
    make_epoch,
)
from steward.model.placement import Placement

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    rev INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    term INTEGER NOT NULL
);
INSERT OR IGNORE INTO meta (id, rev, generation, term) VALUES (1, 0, 0, 0);
CREATE TABLE IF NOT EXISTS node (
    node_id TEXT PRIMARY KEY,
    node_rev INTEGER NOT NULL,
    boot_id TEXT NOT NULL,
    nonce TEXT NOT NULL,
    address TEXT NOT NULL,
    zone TEXT NOT NULL,
    capacity INTEGER NOT NULL,
    version TEXT NOT NULL,
    pid INTEGER NOT NULL,
    draining INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tomb (
    nonce TEXT PRIMARY KEY,
    node_id TEXT NOT NULL,
    node_rev INTEGER NOT NULL,
    cause TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS placement (
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    node_id TEXT NOT NULL,
    node_rev INTEGER NOT NULL,
    address TEXT NOT NULL,
    PRIMARY KEY (tenant, user)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ledger (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    rev INTEGER NOT NULL,
    at_ms INTEGER NOT NULL,
    kind TEXT NOT NULL,
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    node_id TEXT NOT NULL,
    node_rev INTEGER NOT NULL,
    cause TEXT NOT NULL,
    evidence TEXT NOT NULL,
    traceparent TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS ledger_user ON ledger (tenant, user, number) WHERE user <> '';
"""

_NODE = "node_id, node_rev, boot_id, nonce, address, zone, capacity, version, pid, draining"
_LEDGER = "rev, at_ms, kind, tenant, user, epoch, node_id, node_rev, cause, evidence, traceparent"


class Tables:
    """The statements of one connection. `begin` and `finish` enclose the operations of a batch."""

    def __init__(self, connection: sqlite3.Connection, wall_ms: Callable[[], int]) -> None:
        self._db = connection
        self._wall_ms = wall_ms
        self._generation = 0
        self._rev = 0
        self._stored_rev = 0
        self._at_ms = 0
        self._rows: list[tuple[Any, ...]] = []

    def create(self) -> None:
        """Make what is missing; inside the caller's transaction."""
        for statement in SCHEMA.split(";"):
            if statement.strip():
                self._db.execute(statement)

    def start(self) -> tuple[int, StoreView]:
        """Raise the term; returns it and what is there."""
        self._db.execute("UPDATE meta SET term = term + 1")
        rev, generation, term = self._db.execute(
            "SELECT rev, generation, term FROM meta"
        ).fetchone()
        nodes = self._db.execute(f"SELECT {_NODE} FROM node ORDER BY node_rev").fetchall()
        counts = self._db.execute(
            "SELECT p.node_id, p.node_rev, count(*) FROM placement p JOIN node n"
            " ON n.node_id = p.node_id AND n.node_rev = p.node_rev"
            " GROUP BY p.node_id, p.node_rev ORDER BY p.node_id"
        ).fetchall()
        return term, StoreView(
            generation,
            Revision(rev),
            tuple(_record(row) for row in nodes),
            tuple((NodeIncarnation(node_id, rev), count) for node_id, rev, count in counts),
        )

    def begin(self) -> int:
        """Start a batch; returns the term that is stored."""
        row = self._db.execute("SELECT rev, generation, term FROM meta").fetchone()
        self._rev, self._generation, term = row
        self._stored_rev = self._rev
        self._at_ms = self._wall_ms()
        self._rows = []
        return int(term)

    def finish(self) -> Revision:
        """Write the ledger rows and the revision of this batch."""
        if self._rows:
            self._db.executemany(
                f"INSERT INTO ledger ({_LEDGER}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                self._rows,
            )
        if self._rev != self._stored_rev:
            self._db.execute("UPDATE meta SET rev = ?", (self._rev,))
        return Revision(self._rev)

    def apply(self, operation: StoreOperation) -> StoreResult:
        match operation:
            case PlaceUser():
                return self._place(operation)
            case ReleasePlacement():
                return self._release(operation)
            case ReadPlacement(user):
                placement, alive = self._read(user)
                return PlacementRead(placement, alive)
            case JoinNode(claim):
                return self._join(claim)
            case FenceNode():
                return self._fence(operation)
            case DrainNode():
                return self._drain(operation)
            case RecordRefusal(kind, detail, user, epoch, node, trace):
                self._record("refusal", user, epoch, node, kind, detail, trace)
                return Done(True)

    def _place(self, operation: PlaceUser) -> UserPlaced | TargetRefused:
        user, target = operation.user, operation.target
        previous, alive = self._read(user)
        if previous is not None and alive:
            return UserPlaced(previous, False)
        node = self._db.execute(
            "SELECT address, draining FROM node WHERE node_id = ? AND node_rev = ?", target
        ).fetchone()
        if node is None or node[1]:
            return TargetRefused(node is not None)
        self._rev += 1
        epoch = make_epoch(self._generation, self._rev)
        placement = Placement(user, epoch, target.node_id, target.node_rev, node[0])
        self._db.execute(
            "INSERT OR REPLACE INTO placement (tenant, user, epoch, node_id, node_rev, address)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (*user, epoch, *target, node[0]),
        )
        if previous is None:
            self._record("place", user, epoch, target, operation.cause)
        else:
            was = moved_from(previous.node_id, previous.node_rev, previous.epoch)
            self._record("takeover", user, epoch, target, operation.cause, was)
        return UserPlaced(placement, True)

    def _release(self, operation: ReleasePlacement) -> PlacementReleased:
        user, epoch, holder = operation.user, operation.epoch, operation.holder
        current, _ = self._read(user)
        if current is None:
            return PlacementReleased(False, None)
        if current.epoch != epoch or current.incarnation != holder:
            now = f"is on {current.node_id}/{current.node_rev} under {current.epoch}"
            self._record("refusal", user, epoch, holder, "stale_release", now)
            return PlacementReleased(False, current)
        self._rev += 1
        self._db.execute("DELETE FROM placement WHERE tenant = ? AND user = ?", user)
        self._record("release", user, epoch, holder, operation.cause)
        return PlacementReleased(True, None)

    def _join(self, claim: NodeClaim) -> NodeJoined | NodeOccupied | NonceSpent:
        row = self._db.execute(
            f"SELECT {_NODE} FROM node WHERE node_id = ?", (claim.node_id,)
        ).fetchone()
        if row is not None:
            present = _record(row)
            same = present.claim.nonce == claim.nonce
            return NodeJoined(present) if same else NodeOccupied(present)
        tomb = self._db.execute(
            "SELECT node_id, node_rev, cause FROM tomb WHERE nonce = ?", (claim.nonce,)
        ).fetchone()
        if tomb is not None:
            return NonceSpent(NodeIncarnation(tomb[0], tomb[1]), tomb[2])
        self._rev += 1
        self._db.execute(
            f"INSERT INTO node ({_NODE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
            (
                claim.node_id,
                self._rev,
                claim.boot_id,
                claim.nonce,
                claim.address,
                claim.zone,
                claim.capacity,
                claim.version,
                claim.pid,
            ),
        )
        record = NodeRecord(claim, NodeRev(self._rev))
        self._record("join", None, 0, record.incarnation, claim.address)
        return NodeJoined(record)

    def _fence(self, operation: FenceNode) -> Done:
        incarnation, cause = operation.incarnation, operation.cause
        row = self._db.execute(
            "DELETE FROM node WHERE node_id = ? AND node_rev = ? RETURNING nonce", incarnation
        ).fetchone()
        if row is None:
            return Done(False)
        self._rev += 1
        self._db.execute(
            "INSERT OR REPLACE INTO tomb (nonce, node_id, node_rev, cause) VALUES (?, ?, ?, ?)",
            (row[0], *incarnation, cause),
        )
        evidence = f"{operation.evidence.value}: {operation.detail}"
        self._record("fence", None, 0, incarnation, cause, evidence)
        return Done(True)

    def _drain(self, operation: DrainNode) -> Done:
        changed = self._db.execute(
            "UPDATE node SET draining = 1 WHERE node_id = ? AND node_rev = ? AND draining = 0",
            operation.incarnation,
        ).rowcount
        if changed:
            self._rev += 1
            self._record("drain", None, 0, operation.incarnation, operation.cause)
        return Done(bool(changed))

    def _read(self, user: UserKey) -> tuple[Placement | None, bool]:
        """The user's placement, and whether its incarnation lives."""
        row = self._db.execute(
            "SELECT p.epoch, p.node_id, p.node_rev, p.address, n.node_rev IS p.node_rev"
            " FROM placement p LEFT JOIN node n ON n.node_id = p.node_id"
            " WHERE p.tenant = ? AND p.user = ?",
            user,
        ).fetchone()
        if row is None:
            return None, False
        epoch, node_id, node_rev, address, alive = row
        return Placement(user, Epoch(epoch), NodeId(node_id), NodeRev(node_rev), address), bool(
            alive
        )

    def _record(
        self,
        kind: str,
        user: UserKey | None,
        epoch: int,
        node: NodeIncarnation | None,
        cause: str,
        evidence: str = "",
        trace: str = "",
    ) -> None:
        tenant, name = user or ("", "")
        node_id, node_rev = node or ("", 0)
        self._rows.append(
            (
                self._rev,
                self._at_ms,
                kind,
                tenant,
                name,
                epoch,
                node_id,
                node_rev,
                cause,
                evidence,
                trace,
            )
        )


def read_ledger(db: sqlite3.Connection, user: UserKey | None, limit: int) -> list[LedgerRow]:
    """The newest rows, newest first."""
    where = ""
    parameters: tuple[str | int, ...] = (limit,)
    if user is not None:
        where, parameters = "WHERE user <> '' AND tenant = ? AND user = ?", (*user, limit)
    rows = db.execute(
        f"SELECT number, {_LEDGER} FROM ledger {where} ORDER BY number DESC LIMIT ?", parameters
    )
    return [LedgerRow(*row) for row in rows]


def _record(row: tuple[Any, ...]) -> NodeRecord:
    node_id, node_rev, boot_id, nonce, address, zone, capacity, version, pid, draining = row
    claim = NodeClaim(node_id, boot_id, nonce, address, zone, capacity, version, pid)
    return NodeRecord(claim, NodeRev(node_rev), bool(draining))
