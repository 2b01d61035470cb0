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
    DrainNode,
    FenceNode,
    JoinNode,
    NodeJoined,
    NodeOccupied,
    NodeRecord,
    NonceSpent,
    Outcome,
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
    TermLost,
    UserPlaced,
)
from registry_service.store.port import LedgerRow, moved_from
from steward.model.keys import (
    NodeId,
    NodeIncarnation,
    NodeRev,
    Revision,
    UserKey,
    make_epoch,
)
from steward.model.placement import Placement


class MemoryDisk:
    """The contents of a store. `wall_ms` stamps ledger rows."""

    def __init__(self, wall_ms: Callable[[], int], generation: int = 0) -> None:
        self.generation = generation
        self.revision = 0
        self.term = 0
        self.nodes: dict[NodeId, NodeRecord] = {}
        self.placements: dict[UserKey, Placement] = {}
        self.tombs: dict[str, tuple[NodeIncarnation, str]] = {}
        self.rows: list[LedgerRow] = []
        self._wall_ms = wall_ms

    def open(self) -> tuple[int, StoreView]:
        """Raise the term; returns it and what is there."""
        self.term += 1
        counts: dict[NodeIncarnation, int] = {}
        for placement in self.placements.values():
            if self._alive(placement.incarnation):
                counts[placement.incarnation] = counts.get(placement.incarnation, 0) + 1
        nodes = tuple(sorted(self.nodes.values(), key=lambda node: node.node_rev))
        return self.term, StoreView(
            self.generation, Revision(self.revision), nodes, tuple(sorted(counts.items()))
        )

    def apply(self, term: int, operations: tuple[StoreOperation, ...]) -> Outcome:
        """One transaction of the opener that has `term`."""
        if term != self.term:
            return TermLost(self.term)
        results = tuple(self._apply(operation) for operation in operations)
        return Committed(results, Revision(self.revision))

    def _apply(self, operation: StoreOperation) -> StoreResult:
        match operation:
            case PlaceUser():
                return self._place(operation)
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
            case DrainNode():
                return self._drain(operation)
            case RecordRefusal(kind, detail, user, epoch, node, traceparent):
                self._record(
                    "refusal",
                    user,
                    epoch,
                    node,
                    cause=kind,
                    evidence=detail,
                    traceparent=traceparent,
                )
                return Done(True)

    def _place(self, operation: PlaceUser) -> UserPlaced | TargetRefused:
        user, target = operation.user, operation.target
        previous = self.placements.get(user)
        if previous is not None and self._alive(previous.incarnation):
            return UserPlaced(previous, False)
        node = self.nodes.get(target.node_id)
        if node is None or node.incarnation != target or node.draining:
            return TargetRefused(node is not None and node.incarnation == target)
        self.revision += 1
        placement = Placement(
            user,
            make_epoch(self.generation, self.revision),
            target.node_id,
            target.node_rev,
            node.claim.address,
        )
        self.placements[user] = placement
        kind, evidence = "place", ""
        if previous is not None:
            kind = "takeover"
            evidence = moved_from(previous.node_id, previous.node_rev, previous.epoch)
        self._record(kind, user, placement.epoch, target, cause=operation.cause, evidence=evidence)
        return UserPlaced(placement, True)

    def _release(self, operation: ReleasePlacement) -> PlacementReleased:
        user, epoch, holder = operation.user, operation.epoch, operation.holder
        current = self.placements.get(user)
        if current is None:
            return PlacementReleased(False, None)
        if current.epoch != epoch or current.incarnation != holder:
            self._record(
                "refusal",
                user,
                epoch,
                holder,
                cause="stale_release",
                evidence=f"is on {current.node_id}/{current.node_rev} under {current.epoch}",
            )
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
        record = NodeRecord(claim, NodeRev(self.revision))
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
        evidence = f"{operation.evidence.value}: {operation.detail}"
        self._record("fence", None, 0, incarnation, cause=operation.cause, evidence=evidence)
        return Done(True)

    def _drain(self, operation: DrainNode) -> Done:
        incarnation = operation.incarnation
        node = self.nodes.get(incarnation.node_id)
        if node is None or node.incarnation != incarnation or node.draining:
            return Done(False)
        self.revision += 1
        self.nodes[incarnation.node_id] = NodeRecord(node.claim, node.node_rev, True)
        self._record("drain", None, 0, incarnation, cause=operation.cause)
        return Done(True)

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

    def __init__(self, disk: MemoryDisk) -> None:
        self._disk = disk
        self._term = 0

    async def open(self) -> StoreView:
        self._term, view = self._disk.open()
        return view

    def commit(self, operations: tuple[StoreOperation, ...]) -> "Future[Outcome]":
        future: Future[Outcome] = asyncio.get_running_loop().create_future()
        future.set_result(self._disk.apply(self._term, operations))
        return future

    async def ledger(self, user: UserKey | None, limit: int) -> list[LedgerRow]:
        rows = [row for row in self._disk.rows if user is None or (row.tenant, row.user) == user]
        return rows[::-1][:limit]

    async def close(self) -> None:
        return None
