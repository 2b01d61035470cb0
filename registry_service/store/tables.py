"""The statements of the SQLite store: the rules of the operations in SQL.

Used on the store's writer thread, inside a transaction that the store opens and ends.
"""

import sqlite3
from collections.abc import Callable, Iterable

from registry_service.core.transactions import (
    Done,
    FenceNode,
    GenerationIs,
    Hold,
    JoinNode,
    LiftHold,
    ListPlacements,
    MarkDraining,
    NodeClaim,
    NodeJoined,
    NodeOccupied,
    NodeRecord,
    NonceSpent,
    PlacementPage,
    PlacementRead,
    PlacementReleased,
    PlaceUser,
    RaiseGeneration,
    ReadPlacement,
    RecordViolation,
    ReleasePlacement,
    StoreOperation,
    StoreResult,
    StoreView,
    TakeOver,
    TargetRefused,
    UserHeld,
    UserPlaced,
    UserTakenOver,
    ViolationRecorded,
    fence_of_raise,
)
from registry_service.store.ledger_table import LedgerTable
from registry_service.store.placement_table import PlacementTable
from registry_service.store.port import (
    START,
    StoreMark,
    handed_off_from,
    moved_from,
)
from registry_service.store.schema import NODE, SCHEMA, node_record
from registry_service.store.violation_table import KEEP, ViolationTable
from registry_service.store.witness import Witness
from steward.model.keys import (
    GENERATION_SHIFT,
    Epoch,
    NodeIncarnation,
    NodeRev,
    Revision,
    UserKey,
    make_epoch,
)
from steward.model.placement import Placement

_OF_A_USER = (PlaceUser, TakeOver, ReleasePlacement, ReadPlacement)

_NOBODY = UserKey("", "")

MOST_OPERATIONS = 512
"""In one batch. A large one costs little more than a small one, up to the size of a resolve."""


class Tables:
    """The statements of one connection. `begin` and `finish` enclose the operations of a batch."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        wall_ms: Callable[[], int],
        keep_violations: int = KEEP,
    ) -> None:
        self._db = connection
        self._wall_ms = wall_ms
        self.violations = ViolationTable(connection, keep_violations)
        self.mark = START
        self._ledger = LedgerTable(connection)
        self._instance = ""
        self._term = 0
        self._generation = 0
        self._rev = 0
        self._stored = (0, 0)
        self._placements = PlacementTable(connection)
        # Nodes that were read in this batch.
        self._nodes: dict[NodeIncarnation, tuple[str, int] | None] = {}
        self._at_ms = 0

    def create(self) -> None:
        """Make what is missing; inside the caller's transaction."""
        for statement in SCHEMA.split(";"):
            if statement.strip():
                self._db.execute(statement)
        self.violations.create()

    def found(self) -> Witness:
        """How far the file is, before anything is done to it."""
        (self._instance,) = self._db.execute("SELECT instance FROM identity").fetchone()
        self._term = self.begin()
        return self.witness

    @property
    def witness(self) -> Witness:
        """How far the file is, after the transaction under way."""
        return Witness(self._instance, self._term, self._generation, self._rev)

    def start(
        self, generation: int = 0, raised: str = "", least_term: int = 0
    ) -> tuple[int, StoreView]:
        """Raise the term, and the generation if need be; returns the term and what is there."""
        self.violations.start()
        self._ledger.start()
        self.begin()
        self._raise_generation(generation, raised)
        self.finish()
        self._db.execute("UPDATE meta SET term = max(term, ?) + 1", (least_term,))
        rev, generation, term = self._db.execute(
            "SELECT rev, generation, term FROM meta"
        ).fetchone()
        self._rev, self._generation, self._term = rev, generation, term
        self._set_mark()
        nodes = self._db.execute(f"SELECT {NODE} FROM node ORDER BY node_rev").fetchall()
        counts = self._db.execute(
            "SELECT p.node_id, p.node_rev, count(*) FROM placement p JOIN node n"
            " ON n.node_id = p.node_id AND n.node_rev = p.node_rev"
            " GROUP BY p.node_id, p.node_rev ORDER BY p.node_id"
        ).fetchall()
        holds = self._db.execute(
            "SELECT node_id, node_rev, pid FROM hold ORDER BY node_id, node_rev"
        ).fetchall()
        return term, StoreView(
            generation,
            Revision(rev),
            tuple(node_record(row) for row in nodes),
            tuple((NodeIncarnation(node_id, rev), count) for node_id, rev, count in counts),
            tuple(Hold(NodeIncarnation(node_id, rev), pid) for node_id, rev, pid in holds),
            raised,
            MOST_OPERATIONS,
        )

    def begin(self) -> int:
        """Start a batch; returns the term that is stored."""
        row = self._db.execute("SELECT rev, generation, term FROM meta").fetchone()
        self._rev, self._generation, term = row
        self._stored = (self._rev, self._generation)
        self._at_ms = self._wall_ms()
        self._nodes = {}
        self._placements.begin()
        return int(term)

    def expect(self, operations: Iterable[StoreOperation]) -> None:
        """Read at once what these operations, the next of this batch, will look at."""
        users = {operation.user for operation in operations if isinstance(operation, _OF_A_USER)}
        if users:
            self._placements.load(users)

    def finish(self) -> Revision:
        """Write the placements, the ledger rows and the revision of this batch."""
        self._placements.write()
        self._ledger.write()
        now = (self._rev, self._generation)
        if now != self._stored:
            self._db.execute("UPDATE meta SET rev = ?, generation = ?", now)
        self.violations.finish()
        self._set_mark()
        return Revision(self._rev)

    def _set_mark(self) -> None:
        epoch = Epoch(self._generation << GENERATION_SHIFT | self._rev)
        self.mark = StoreMark(self._ledger.last, self.violations.last, Revision(self._rev), epoch)

    def apply(self, operation: StoreOperation) -> StoreResult:
        match operation:
            case PlaceUser():
                return self._place(operation)
            case TakeOver():
                return self._take_over(operation)
            case ReleasePlacement():
                return self._release(operation)
            case ReadPlacement(user):
                placement = self._placements.get(user)
                return PlacementRead(placement, self._alive(placement))
            case JoinNode() | FenceNode() | MarkDraining():
                self._nodes = {}
                return self._change_node(operation)
            case LiftHold(incarnation):
                lifted = "DELETE FROM hold WHERE node_id = ? AND node_rev = ?"
                return Done(bool(self._db.execute(lifted, incarnation).rowcount))
            case ListPlacements():
                return self._list(operation)
            case RaiseGeneration(at_least, cause):
                return self._raise_generation(at_least, cause)
            case RecordViolation(violation, reporter):
                return ViolationRecorded(self.violations.record(violation, reporter, self._at_ms))

    def _place(self, operation: PlaceUser) -> UserPlaced | UserHeld | TargetRefused:
        user, target, trace = operation.user, operation.target, operation.traceparent
        previous = self._placements.get(user)
        if previous is not None:
            if self._alive(previous):
                return UserPlaced(previous, False)
            if operation.strict and self._held(previous.incarnation):
                return UserHeld(previous)
        node = self._node(target)
        if node is None or node[1]:
            return TargetRefused(node is not None)
        placement = self._put(user, target, node[0])
        if previous is None:
            self._record("place", user, placement.epoch, target, operation.cause, "", trace)
        else:
            was = moved_from(previous.node_id, previous.node_rev, previous.epoch)
            self._record("takeover", user, placement.epoch, target, operation.cause, was, trace)
        return UserPlaced(placement, True)

    def _node(self, incarnation: NodeIncarnation) -> tuple[str, int] | None:
        """Address of a living incarnation, and whether it drains."""
        if incarnation not in self._nodes:
            self._nodes[incarnation] = self._db.execute(
                "SELECT address, draining FROM node WHERE node_id = ? AND node_rev = ?",
                incarnation,
            ).fetchone()
        return self._nodes[incarnation]

    def _alive(self, placement: Placement | None) -> bool:
        """Whether there is a placement and its incarnation lives."""
        return placement is not None and self._node(placement.incarnation) is not None

    def _held(self, incarnation: NodeIncarnation) -> bool:
        held = "SELECT 1 FROM hold WHERE node_id = ? AND node_rev = ?"
        return self._db.execute(held, incarnation).fetchone() is not None

    def _put(self, user: UserKey, target: NodeIncarnation, address: str) -> Placement:
        self._rev += 1
        epoch = make_epoch(self._generation, self._rev)
        placement = Placement(user, epoch, target.node_id, target.node_rev, address)
        self._placements.put(placement)
        return placement

    def _take_over(self, operation: TakeOver) -> UserTakenOver | PlacementReleased:
        user, epoch, holder = operation.user, operation.epoch, operation.holder
        target, cause = operation.target, operation.cause
        node = self._node(target) if target is not None else None
        if target is None or node is None or node[1]:
            return self._release(ReleasePlacement(user, epoch, holder, cause))
        current = self._placements.get(user)
        if current is None or current.epoch != epoch or current.incarnation != holder:
            return PlacementReleased(False, current)
        placement = self._put(user, target, node[0])
        was = handed_off_from(*holder, epoch)
        self._record("takeover", user, placement.epoch, target, cause, was)
        return UserTakenOver(placement)

    def _list(self, operation: ListPlacements) -> PlacementPage:
        self._placements.write()
        # Without an index: all pages together read the table once, and no other write pays for it.
        rows = self._db.execute(
            "SELECT tenant, user, epoch, address FROM placement WHERE (tenant, user) > (?, ?)"
            " AND node_id = ? AND node_rev = ? ORDER BY tenant, user LIMIT ?",
            (*(operation.after or ("", "")), *operation.incarnation, operation.limit + 1),
        ).fetchall()
        page = tuple(
            Placement(UserKey(tenant, user), Epoch(epoch), *operation.incarnation, address)
            for tenant, user, epoch, address in rows[: operation.limit]
        )
        return PlacementPage(page, len(rows) > len(page))

    def _raise_generation(self, at_least: int, cause: str) -> GenerationIs:
        raised = at_least > self._generation
        if raised:
            make_epoch(at_least, 1)  # Refuses what no epoch can carry.
            self._rev += 1
            self._generation = at_least
            self._record("generation", None, 0, None, cause, f"now {at_least}")
            self._nodes = {}
            there = self._db.execute("SELECT node_id, node_rev FROM node ORDER BY node_rev")
            for node_id, node_rev in there.fetchall():
                self._fence(fence_of_raise(NodeIncarnation(node_id, node_rev)))
        return GenerationIs(self._generation, raised)

    def _release(self, operation: ReleasePlacement) -> PlacementReleased:
        user, epoch, holder = operation.user, operation.epoch, operation.holder
        current = self._placements.get(user)
        if current is None or current.epoch != epoch or current.incarnation != holder:
            return PlacementReleased(False, current)
        self._rev += 1
        self._placements.delete(user)
        self._record("release", user, epoch, holder, operation.cause)
        return PlacementReleased(True, None)

    def _change_node(self, operation: JoinNode | FenceNode | MarkDraining) -> StoreResult:
        match operation:
            case JoinNode(claim):
                return self._join(claim)
            case FenceNode():
                return self._fence(operation)
            case MarkDraining():
                return self._drain(operation)

    def _join(self, claim: NodeClaim) -> NodeJoined | NodeOccupied | NonceSpent:
        row = self._db.execute(
            f"SELECT {NODE} FROM node WHERE node_id = ?", (claim.node_id,)
        ).fetchone()
        if row is not None:
            present = node_record(row)
            same = present.claim.nonce == claim.nonce
            return NodeJoined(present) if same else NodeOccupied(present)
        tomb = self._db.execute(
            "SELECT node_id, node_rev, cause FROM tomb WHERE nonce = ?", (claim.nonce,)
        ).fetchone()
        if tomb is not None:
            return NonceSpent(NodeIncarnation(tomb[0], tomb[1]), tomb[2])
        self._rev += 1
        node_rev = NodeRev(make_epoch(self._generation, self._rev))
        self._db.execute(
            f"INSERT INTO node ({NODE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
            (
                claim.node_id,
                node_rev,
                claim.boot_id,
                claim.nonce,
                claim.address,
                claim.zone,
                claim.capacity,
                claim.version,
                claim.pid,
            ),
        )
        record = NodeRecord(claim, node_rev)
        self._record("join", None, 0, record.incarnation, claim.address)
        return NodeJoined(record)

    def _fence(self, operation: FenceNode) -> Done:
        incarnation, cause = operation.incarnation, operation.cause
        row = self._db.execute(
            "DELETE FROM node WHERE node_id = ? AND node_rev = ? RETURNING nonce, pid", incarnation
        ).fetchone()
        if row is None:
            return Done(False)
        self._rev += 1
        self._db.execute(
            "INSERT OR REPLACE INTO tomb (nonce, node_id, node_rev, cause) VALUES (?, ?, ?, ?)",
            (row[0], *incarnation, cause),
        )
        if operation.hold:
            self._db.execute("INSERT OR REPLACE INTO hold VALUES (?, ?, ?)", (*incarnation, row[1]))
        evidence = f"{operation.evidence.value}: {operation.detail}"
        self._record("fence", None, 0, incarnation, cause, evidence)
        return Done(True)

    def _drain(self, operation: MarkDraining) -> Done:
        changed = self._db.execute(
            "UPDATE node SET draining = 1 WHERE node_id = ? AND node_rev = ? AND draining = 0",
            operation.incarnation,
        ).rowcount
        if changed:
            self._rev += 1
            self._record("drain", None, 0, operation.incarnation, operation.cause)
        return Done(bool(changed))

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
        who = user or _NOBODY
        node_id, node_rev = node or ("", 0)
        change = (self._rev, self._at_ms, kind, *who, epoch, node_id, node_rev)
        self._ledger.add((*change, cause, evidence, trace), who)
