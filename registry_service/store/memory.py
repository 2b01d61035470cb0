"""The placement store in memory: for tests and the simulation, and the plainest form of its rules.

A `MemoryDisk` is what survives a restart; a `MemoryStore` is one opener of it. `MemoryDisk.apply`
is synchronous, so that a simulation can use it without an event loop. Nothing here is
durable.
"""

import asyncio
from asyncio import Future
from collections.abc import Callable

from registry_service.core.transactions import (
    Committed,
    Done,
    FenceNode,
    GenerationIs,
    Hold,
    JoinNode,
    LiftHold,
    ListPlacements,
    MarkDraining,
    NodeJoined,
    NodeOccupied,
    NodeRecord,
    NonceSpent,
    Outcome,
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
    TermLost,
    UserHeld,
    UserPlaced,
    UserTakenOver,
    ViolationRecorded,
    fence_of_raise,
)
from registry_service.store.port import (
    START,
    LedgerRow,
    StoreMark,
    handed_off_from,
    moved_from,
)
from registry_service.store.violation_table import (
    KEEP,
    MemoryViolations,
    ViolationRow,
    ViolationTotals,
)
from registry_service.store.witness import Witness, needed_generation
from steward.model.keys import (
    GENERATION_SHIFT,
    Epoch,
    NodeId,
    NodeIncarnation,
    NodeRev,
    Revision,
    UserKey,
    make_epoch,
)
from steward.model.placement import Placement
from steward.model.violations import Severity


class MemoryDisk:
    """The contents of a store. `wall_ms` stamps ledger rows. A backup has no `witness`."""

    def __init__(
        self, wall_ms: Callable[[], int], generation: int = 0, keep_violations: int = KEEP
    ) -> None:
        self.generation = generation
        self.revision = 0
        self.term = 0
        self.nodes: dict[NodeId, NodeRecord] = {}
        self.placements: dict[UserKey, Placement] = {}
        self.tombs: dict[str, tuple[NodeIncarnation, str]] = {}
        self.holds: dict[NodeIncarnation, Hold] = {}
        self.rows: list[LedgerRow] = []
        self.violations = MemoryViolations(keep_violations)
        self.witness: Witness | None = None
        self._wall_ms = wall_ms

    def open(self, least_generation: int = 0) -> tuple[int, StoreView]:
        """Raise the term, and the generation if need be; returns the term and what is there."""
        found, witness = self._found(), self.witness
        generation, raised = needed_generation(found, witness, least_generation)
        self._raise_generation(generation, raised)
        self.term = max(self.term, witness.term if witness is not None else 0) + 1
        self.witness = self._found()
        counts: dict[NodeIncarnation, int] = {}
        for placement in self.placements.values():
            if self._alive(placement.incarnation):
                counts[placement.incarnation] = counts.get(placement.incarnation, 0) + 1
        nodes = tuple(sorted(self.nodes.values(), key=lambda node: node.node_rev))
        return self.term, StoreView(
            self.generation,
            Revision(self.revision),
            nodes,
            tuple(sorted(counts.items())),
            tuple(hold for _, hold in sorted(self.holds.items())),
            raised,
        )

    def _found(self) -> Witness:
        return Witness("memory", self.term, self.generation, self.revision)

    def apply(self, term: int, operations: tuple[StoreOperation, ...]) -> Outcome:
        """One transaction of the opener that has `term`."""
        if term != self.term:
            return TermLost(self.term)
        results = tuple(self._apply(operation) for operation in operations)
        self.violations.finish()
        self.witness = self._found()
        return Committed(results, Revision(self.revision))

    def _apply(self, operation: StoreOperation) -> StoreResult:
        match operation:
            case PlaceUser():
                return self._place(operation)
            case TakeOver():
                return self._take_over(operation)
            case ReleasePlacement():
                return self._release(operation)
            case ReadPlacement(user):
                placement = self.placements.get(user)
                alive = placement is not None and self._alive(placement.incarnation)
                return PlacementRead(placement, alive)
            case JoinNode():
                return self._join(operation)
            case FenceNode():
                return self._fence(operation)
            case LiftHold(incarnation):
                return Done(self.holds.pop(incarnation, None) is not None)
            case MarkDraining():
                return self._drain(operation)
            case ListPlacements():
                return self._list(operation)
            case RaiseGeneration(at_least, cause):
                return self._raise_generation(at_least, cause)
            case RecordViolation(violation, reporter):
                number = self.violations.record(violation, reporter, self._wall_ms())
                return ViolationRecorded(number)

    def _place(self, operation: PlaceUser) -> UserPlaced | UserHeld | TargetRefused:
        user, target = operation.user, operation.target
        previous = self.placements.get(user)
        if previous is not None and self._alive(previous.incarnation):
            return UserPlaced(previous, False)
        if previous is not None and operation.strict and previous.incarnation in self.holds:
            return UserHeld(previous)
        node = self.nodes.get(target.node_id)
        if node is None or node.incarnation != target or node.draining:
            return TargetRefused(node is not None and node.incarnation == target)
        placement = self._put(user, node)
        kind, evidence = "place", ""
        if previous is not None:
            kind = "takeover"
            evidence = moved_from(previous.node_id, previous.node_rev, previous.epoch)
        self._record(
            kind,
            user,
            placement.epoch,
            target,
            cause=operation.cause,
            evidence=evidence,
            traceparent=operation.traceparent,
        )
        return UserPlaced(placement, True)

    def _put(self, user: UserKey, node: NodeRecord) -> Placement:
        self.revision += 1
        placement = Placement(
            user,
            make_epoch(self.generation, self.revision),
            node.claim.node_id,
            node.node_rev,
            node.claim.address,
        )
        self.placements[user] = placement
        return placement

    def _take_over(self, operation: TakeOver) -> UserTakenOver | PlacementReleased:
        user, epoch, holder, target = (
            operation.user,
            operation.epoch,
            operation.holder,
            operation.target,
        )
        node = self.nodes.get(target.node_id) if target is not None else None
        if node is None or node.incarnation != target or node.draining:
            return self._release(ReleasePlacement(user, epoch, holder, operation.cause))
        current = self.placements.get(user)
        if current is None or current.epoch != epoch or current.incarnation != holder:
            return PlacementReleased(False, current)
        placement = self._put(user, node)
        evidence = handed_off_from(*holder, epoch)
        self._record(
            "takeover", user, placement.epoch, target, cause=operation.cause, evidence=evidence
        )
        return UserTakenOver(placement)

    def _list(self, operation: ListPlacements) -> PlacementPage:
        after = operation.after
        found = [
            placement
            for user, placement in sorted(self.placements.items())
            if placement.incarnation == operation.incarnation and (after is None or user > after)
        ]
        page = tuple(found[: operation.limit])
        return PlacementPage(page, len(found) > len(page))

    def _raise_generation(self, at_least: int, cause: str) -> GenerationIs:
        raised = at_least > self.generation
        if raised:
            make_epoch(at_least, 1)  # Refuses what no epoch can carry.
            self.revision += 1
            self.generation = at_least
            self._record("generation", None, 0, None, cause=cause, evidence=f"now {at_least}")
            for node in sorted(self.nodes.values(), key=lambda node: node.node_rev):
                self._fence(fence_of_raise(node.incarnation))
        return GenerationIs(self.generation, raised)

    def _release(self, operation: ReleasePlacement) -> PlacementReleased:
        user, epoch, holder = operation.user, operation.epoch, operation.holder
        current = self.placements.get(user)
        if current is None or current.epoch != epoch or current.incarnation != holder:
            return PlacementReleased(False, current)
        self.revision += 1
        del self.placements[user]
        self._record("release", user, epoch, holder, cause=operation.cause)
        return PlacementReleased(True, None)

    def _join(self, operation: JoinNode) -> NodeJoined | NodeOccupied | NonceSpent:
        claim = operation.claim
        present = self.nodes.get(claim.node_id)
        if present is not None:
            return (
                NodeJoined(present) if present.claim.nonce == claim.nonce else NodeOccupied(present)
            )
        if claim.nonce in self.tombs:
            return NonceSpent(*self.tombs[claim.nonce])
        self.revision += 1
        record = NodeRecord(claim, NodeRev(make_epoch(self.generation, self.revision)))
        self.nodes[claim.node_id] = record
        self._record("join", None, 0, record.incarnation, cause=claim.address)
        return NodeJoined(record)

    def _fence(self, operation: FenceNode) -> Done:
        incarnation = operation.incarnation
        if not self._alive(incarnation):
            return Done(False)
        self.revision += 1
        record = self.nodes.pop(incarnation.node_id)
        self.tombs[record.claim.nonce] = (incarnation, operation.cause)
        if operation.hold:
            self.holds[incarnation] = Hold(incarnation, record.claim.pid)
        evidence = f"{operation.evidence.value}: {operation.detail}"
        self._record("fence", None, 0, incarnation, cause=operation.cause, evidence=evidence)
        return Done(True)

    def _drain(self, operation: MarkDraining) -> Done:
        incarnation = operation.incarnation
        node = self.nodes.get(incarnation.node_id)
        if node is None or node.incarnation != incarnation or node.draining:
            return Done(False)
        self.revision += 1
        self.nodes[incarnation.node_id] = NodeRecord(node.claim, node.node_rev, True)
        self._record("drain", None, 0, incarnation, cause=operation.cause)
        return Done(True)

    @property
    def mark(self) -> StoreMark:
        """How far the contents are."""
        epoch = Epoch(self.generation << GENERATION_SHIFT | self.revision)
        return StoreMark(len(self.rows), self.violations.last, Revision(self.revision), epoch)

    def living(self, newest: Epoch) -> list[Placement]:
        """Placements on living nodes of at most this epoch, by user."""
        return [
            placement
            for _, placement in sorted(self.placements.items())
            if placement.epoch <= newest and self._alive(placement.incarnation)
        ]

    def _alive(self, incarnation: NodeIncarnation) -> bool:
        node = self.nodes.get(incarnation.node_id)
        return node is not None and node.node_rev == incarnation.node_rev

    def _record(
        self,
        kind: str,
        user: UserKey | None,
        epoch: int,
        node: NodeIncarnation | None,
        *,
        cause: str,
        evidence: str = "",
        traceparent: str = "",
    ) -> None:
        tenant, name = user or ("", "")
        node_id, node_rev = node or ("", 0)
        self.rows.append(
            LedgerRow(
                len(self.rows) + 1,
                self.revision,
                self._wall_ms(),
                kind,
                tenant,
                name,
                epoch,
                node_id,
                node_rev,
                cause,
                evidence,
                traceparent,
            )
        )


class MemoryStore:
    """One opener of a `MemoryDisk`, as a `PlacementStore`."""

    def __init__(self, disk: MemoryDisk, least_generation: int = 0) -> None:
        self._disk = disk
        self._least_generation = least_generation
        self._term = 0
        self._mark = START

    @property
    def mark(self) -> StoreMark:
        return self._mark

    async def open(self) -> StoreView:
        self._term, view = self._disk.open(self._least_generation)
        self._mark = self._disk.mark
        return view

    def commit(self, operations: tuple[StoreOperation, ...]) -> "Future[Outcome]":
        future: Future[Outcome] = asyncio.get_running_loop().create_future()
        future.set_result(self._disk.apply(self._term, operations))
        self._mark = self._disk.mark
        return future

    async def ledger(self, user: UserKey | None, limit: int) -> list[LedgerRow]:
        rows = [row for row in self._disk.rows if user is None or (row.tenant, row.user) == user]
        return rows[::-1][:limit]

    async def ledger_after(self, number: int, limit: int) -> list[LedgerRow]:
        return self._disk.rows[number : number + limit]

    async def placements(self, after: UserKey | None, limit: int, newest: Epoch) -> list[Placement]:
        living = self._disk.living(newest)
        return [item for item in living if after is None or item.user > after][:limit]

    async def violations(
        self, after: int, limit: int, severity: Severity | None = None, newest: bool = False
    ) -> list[ViolationRow]:
        return self._disk.violations.read(after, limit, severity, newest)

    async def violation_totals(self) -> ViolationTotals:
        return self._disk.violations.totals()

    async def close(self) -> None:
        return None
