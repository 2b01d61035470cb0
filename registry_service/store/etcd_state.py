"""What the store on etcd holds, in the memory of its one writer, and the rules of the operations.

The writer is the only one that changes the store, and each of its transactions compares that
nobody else did; so it decides every operation here, at once, and then writes what changed.
Loaded from keys, and kept as it is by `load` and `unload` of every key that changes, so that a
process which waits for its turn has it ready.

Not guaranteed: that what is here is durable. Only the outcome of a transaction says so.
"""

from dataclasses import replace
from heapq import nsmallest

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
from registry_service.store.etcd_kept import Kept
from registry_service.store.etcd_keys import (
    Head,
    Keys,
    dump_head,
    dump_hold,
    dump_node,
    dump_placement,
    dump_tomb,
    load_head,
    load_hold,
    load_node,
    load_placement,
    load_tomb,
)
from registry_service.store.etcd_writes import Writes
from registry_service.store.port import LedgerRow, StoreMark, handed_off_from, moved_from
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


class State:
    """Nodes, placements, tombs and holds, by the keys of one cluster, and the head."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.head = Head("")
        # The head as it is in the store; empty: there is none.
        self.written = b""
        self.kept = Kept(keys)
        self.nodes: dict[NodeId, NodeRecord] = {}
        self.leases: dict[NodeId, int] = {}
        # Of these, those that are not known to be in etcd yet.
        self.coming: set[int] = set()
        self.placements: dict[UserKey, Placement] = {}
        self._users: dict[NodeIncarnation, dict[UserKey, None]] = {}
        self._tombs: dict[str, tuple[NodeIncarnation, str]] = {}
        self._holds: dict[NodeIncarnation, Hold] = {}

    # From keys

    def load(self, key: bytes, value: bytes, lease: int) -> None:
        """A key has this value. Keys that are no part of the state are passed over."""
        keys = self._keys
        if key.startswith(keys.placements):
            user = keys.user_of(key)
            self._forget(user)
            self._keep(load_placement(user, value))
        elif key == keys.head:
            self.head = load_head(value)
            self.written = value
        elif key.startswith(keys.nodes):
            record = load_node(value)
            self.nodes[record.claim.node_id] = record
            self.leases[record.claim.node_id] = lease
        elif key.startswith(keys.tombs):
            self._tombs[keys.nonce_of(key)] = load_tomb(value)
        elif key.startswith(keys.holds):
            hold = load_hold(value)
            self._holds[hold.incarnation] = hold
        elif key.startswith(keys.violations):
            self.kept.load(key)

    def unload(self, key: bytes) -> None:
        """A key is gone."""
        keys = self._keys
        if key.startswith(keys.placements):
            self._forget(keys.user_of(key))
        elif key.startswith(keys.nodes):
            for node_id in [each for each in self.nodes if keys.node(each) == key]:
                del self.nodes[node_id], self.leases[node_id]
        elif key.startswith(keys.holds):
            for incarnation in [each for each in self._holds if keys.hold(each) == key]:
                del self._holds[incarnation]
        elif key.startswith(keys.violations):
            self.kept.unload(key)

    def view(self, raised: str) -> StoreView:
        """What a starting registry finds."""
        head = self.head
        nodes = tuple(sorted(self.nodes.values(), key=lambda node: node.node_rev))
        counts = tuple(
            sorted(
                (node.incarnation, len(users))
                for node in nodes
                if (users := self._users.get(node.incarnation))
            )
        )
        holds = tuple(hold for _, hold in sorted(self._holds.items()))
        revision = Revision(head.revision)
        return StoreView(head.generation, revision, nodes, counts, holds, raised)

    @property
    def mark(self) -> StoreMark:
        head = self.head
        epoch = Epoch(head.generation << GENERATION_SHIFT | head.revision)
        return StoreMark(head.ledger, head.violations, Revision(head.revision), epoch)

    @property
    def head_key(self) -> bytes:
        return self._keys.head

    @property
    def whole(self) -> bool:
        """Whether all placements are here that the head speaks of."""
        return not self.written or len(self.placements) == load_head(self.written).placements

    def lives(self, incarnation: NodeIncarnation) -> bool:
        node = self.nodes.get(incarnation.node_id)
        return node is not None and node.node_rev == incarnation.node_rev

    # Operations

    def bind_anew(self, incarnation: NodeIncarnation, writes: Writes) -> None:
        """The lease of this node is gone, and so is its key, though nobody fenced it."""
        if self.lives(incarnation):
            lease = self._grant(incarnation.node_id, writes)
            record = self.nodes[incarnation.node_id]
            writes.put(self._keys.node(incarnation.node_id), dump_node(record), lease)

    def apply(self, operation: StoreOperation, writes: Writes) -> StoreResult:
        """Decide one operation; what it changes is added to `writes`."""
        match operation:
            case PlaceUser():
                return self._place(operation, writes)
            case TakeOver():
                return self._take_over(operation, writes)
            case ReleasePlacement():
                return self._release(operation, writes)
            case ReadPlacement(user):
                placement = self._read(user, writes)
                alive = placement is not None and self.lives(placement.incarnation)
                return PlacementRead(placement, alive)
            case JoinNode(claim):
                return self._join(claim, writes)
            case FenceNode():
                return self._fence(operation, writes)
            case LiftHold(incarnation):
                return self._lift(incarnation, writes)
            case MarkDraining():
                return self._drain(operation, writes)
            case ListPlacements():
                return self._list(operation)
            case RaiseGeneration(at_least, cause):
                return self.raise_generation(at_least, cause, writes)
            case RecordViolation(violation, reporter):
                return ViolationRecorded(self.kept.record(self.head, violation, reporter, writes))

    def finish(self, rows_before: int, writes: Writes) -> bytes:
        """End of a transaction that began after that many rows; returns the head after it."""
        self.kept.finish(rows_before, self.head, writes)
        if not writes.empty:
            self.head.transaction += 1
            self.head.placements = len(self.placements)
            self.written = dump_head(self.head)
        return self.written

    def _place(self, operation: PlaceUser, writes: Writes) -> UserPlaced | UserHeld | TargetRefused:
        user, target, trace = operation.user, operation.target, operation.traceparent
        previous = self._read(user, writes)
        if previous is not None and self.lives(previous.incarnation):
            return UserPlaced(previous, False)
        if previous is not None and operation.strict and previous.incarnation in self._holds:
            return UserHeld(previous)
        node = self._taker(target)
        if node is None:
            return TargetRefused(self.lives(target))
        placement = self._put(user, node, writes)
        kind, was = "place", ""
        if previous is not None:
            kind = "takeover"
            was = moved_from(previous.node_id, previous.node_rev, previous.epoch)
        self._tell(writes, kind, user, placement.epoch, target, operation.cause, was, trace)
        return UserPlaced(placement, True)

    def _take_over(self, operation: TakeOver, writes: Writes) -> UserTakenOver | PlacementReleased:
        user, epoch, holder = operation.user, operation.epoch, operation.holder
        target, cause = operation.target, operation.cause
        node = self._taker(target) if target is not None else None
        if node is None:
            return self._release(ReleasePlacement(user, epoch, holder, cause), writes)
        current = self._read(user, writes)
        if current is None or current.epoch != epoch or current.incarnation != holder:
            return PlacementReleased(False, current)
        placement = self._put(user, node, writes)
        was = handed_off_from(*holder, epoch)
        self._tell(writes, "takeover", user, placement.epoch, target, cause, was)
        return UserTakenOver(placement)

    def _release(self, operation: ReleasePlacement, writes: Writes) -> PlacementReleased:
        user, epoch, holder = operation.user, operation.epoch, operation.holder
        current = self._read(user, writes)
        if current is None or current.epoch != epoch or current.incarnation != holder:
            return PlacementReleased(False, current)
        self.head.revision += 1
        self._forget(user)
        writes.delete(self._keys.placement(user))
        self._tell(writes, "release", user, epoch, holder, operation.cause)
        return PlacementReleased(True, None)

    def _list(self, operation: ListPlacements) -> PlacementPage:
        after = operation.after
        users = self._users.get(operation.incarnation, ())
        left = (user for user in users if after is None or user > after)
        found = nsmallest(operation.limit + 1, left)
        page = tuple(self.placements[user] for user in found[: operation.limit])
        return PlacementPage(page, len(found) > len(page))

    def raise_generation(self, at_least: int, cause: str, writes: Writes) -> GenerationIs:
        """The operation `RaiseGeneration`."""
        head = self.head
        raised = at_least > head.generation
        if raised:
            make_epoch(at_least, 1)  # Refuses what no epoch can carry.
            head.revision += 1
            head.generation = at_least
            self._tell(writes, "generation", None, 0, None, cause, f"now {at_least}")
            for node in sorted(self.nodes.values(), key=lambda node: node.node_rev):
                self._fence(fence_of_raise(node.incarnation), writes)
        return GenerationIs(head.generation, raised)

    def _join(self, claim: NodeClaim, writes: Writes) -> NodeJoined | NodeOccupied | NonceSpent:
        present = self.nodes.get(claim.node_id)
        if present is not None:
            same = present.claim.nonce == claim.nonce
            return NodeJoined(present) if same else NodeOccupied(present)
        if claim.nonce in self._tombs:
            return NonceSpent(*self._tombs[claim.nonce])
        self.head.revision += 1
        node_rev = NodeRev(make_epoch(self.head.generation, self.head.revision))
        record = NodeRecord(claim, node_rev)
        self.nodes[claim.node_id] = record
        lease = self._grant(claim.node_id, writes)
        writes.put(self._keys.node(claim.node_id), dump_node(record), lease)
        self._tell(writes, "join", None, 0, record.incarnation, claim.address)
        return NodeJoined(record)

    def _grant(self, node_id: NodeId, writes: Writes) -> int:
        lease = writes.grant()
        self.leases[node_id] = lease
        self.coming.add(lease)
        return lease

    def _fence(self, operation: FenceNode, writes: Writes) -> Done:
        incarnation, cause = operation.incarnation, operation.cause
        if not self.lives(incarnation):
            return Done(False)
        self.head.revision += 1
        record = self.nodes.pop(incarnation.node_id)
        writes.spent.append(self.leases.pop(incarnation.node_id))
        nonce = record.claim.nonce
        self._tombs[nonce] = (incarnation, cause)
        writes.delete(self._keys.node(incarnation.node_id))
        writes.put(self._keys.tomb(nonce), dump_tomb(incarnation, cause))
        if operation.hold:
            hold = Hold(incarnation, record.claim.pid)
            self._holds[incarnation] = hold
            writes.put(self._keys.hold(incarnation), dump_hold(hold))
        evidence = f"{operation.evidence.value}: {operation.detail}"
        self._tell(writes, "fence", None, 0, incarnation, cause, evidence)
        return Done(True)

    def _lift(self, incarnation: NodeIncarnation, writes: Writes) -> Done:
        if self._holds.pop(incarnation, None) is None:
            return Done(False)
        writes.delete(self._keys.hold(incarnation))
        return Done(True)

    def _drain(self, operation: MarkDraining, writes: Writes) -> Done:
        incarnation = operation.incarnation
        node = self.nodes.get(incarnation.node_id)
        if node is None or node.incarnation != incarnation or node.draining:
            return Done(False)
        self.head.revision += 1
        record = replace(node, draining=True)
        self.nodes[incarnation.node_id] = record
        lease = self.leases[incarnation.node_id]
        writes.put(self._keys.node(incarnation.node_id), dump_node(record), lease)
        self._tell(writes, "drain", None, 0, incarnation, operation.cause)
        return Done(True)

    def _read(self, user: UserKey, writes: Writes) -> Placement | None:
        """The placement on which the operation is decided; the transaction compares it."""
        placement = self.placements.get(user)
        value = dump_placement(placement) if placement is not None else None
        writes.guard(self._keys.placement(user), value)
        return placement

    def _taker(self, target: NodeIncarnation) -> NodeRecord | None:
        """The node, if it may be given users."""
        node = self.nodes.get(target.node_id)
        return (
            node if node is not None and node.incarnation == target and not node.draining else None
        )

    def _put(self, user: UserKey, node: NodeRecord, writes: Writes) -> Placement:
        head = self.head
        head.revision += 1
        epoch = make_epoch(head.generation, head.revision)
        claim = node.claim
        placement = Placement(user, epoch, claim.node_id, node.node_rev, claim.address)
        self._forget(user)
        self._keep(placement)
        writes.put(self._keys.placement(user), dump_placement(placement))
        return placement

    def _keep(self, placement: Placement) -> None:
        self.placements[placement.user] = placement
        self._users.setdefault(placement.incarnation, {})[placement.user] = None

    def _forget(self, user: UserKey) -> None:
        placement = self.placements.pop(user, None)
        if placement is not None:
            users = self._users[placement.incarnation]
            del users[user]
            if not users:
                del self._users[placement.incarnation]

    def _tell(
        self,
        writes: Writes,
        kind: str,
        user: UserKey | None,
        epoch: int,
        node: NodeIncarnation | None,
        cause: str,
        evidence: str = "",
        trace: str = "",
    ) -> None:
        head = self.head
        head.ledger += 1
        tenant, name = user or ("", "")
        node_id, node_rev = node or ("", 0)
        writes.rows.append(
            LedgerRow(
                head.ledger,
                head.revision,
                writes.at_ms,
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
