"""The placement store in the simulation: the real rules of `MemoryDisk`, reached over a network.

A transaction may be lost before it is applied, its answer may be lost after, or it is applied
when its caller has long given up and perhaps sent it again. `WatchedDisk` shows each change to the
invariants; a backup of it can be put back.
"""

from collections.abc import Callable
from dataclasses import dataclass

from registry_service.core.transactions import (
    Hold,
    NodeJoined,
    NodeRecord,
    Outcome,
    StoreOperation,
    StoreResult,
    StoreView,
    Unknown,
)
from registry_service.store.memory import MemoryDisk
from registry_service.store.witness import Witness
from steward.model.keys import NodeId, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.testing.faults import WALL_MS, Faults
from steward.testing.invariants import Invariants
from steward.testing.simulated_network import Network, Process
from steward.testing.world import World


@dataclass(frozen=True, slots=True)
class Backup:
    """What a copy of the store held. The witness is beside it: a copy of a whole volume has it."""

    generation: int
    revision: int
    term: int
    nodes: dict[NodeId, NodeRecord]
    holds: dict[NodeIncarnation, Hold]
    witness: Witness | None
    placements: dict[UserKey, Placement]
    tombs: dict[str, tuple[NodeIncarnation, str]]


class WatchedDisk(MemoryDisk):
    """A disk whose every change is checked as it is made."""

    def __init__(self, world: World, invariants: Invariants) -> None:
        super().__init__(lambda: WALL_MS + world.now_ms)
        self._world = world
        self._invariants = invariants
        # How often a backup was put back, and the generation that the operator names for the next
        # start.
        self.restores = 0
        self.least_generation = 0

    def _apply(self, operation: StoreOperation) -> StoreResult:
        user = getattr(operation, "user", None)
        before = self.placements.get(user) if user is not None else None
        before_alive = before is not None and self._alive(before.incarnation)
        result = super()._apply(operation)
        if isinstance(result, NodeJoined):
            record = result.record
            self._invariants.joined(record.incarnation, record.claim.nonce)
        if user is not None:
            after = self.placements.get(user)
            if after != before:
                self._world.note("store: {} is now {}", user, after)
                usable = after is not None and self._usable(after.incarnation)
                self._invariants.placed(operation, before, before_alive, after, usable)
        return result

    def _usable(self, incarnation: NodeIncarnation) -> bool:
        node = self.nodes.get(incarnation.node_id)
        return node is not None and node.incarnation == incarnation and not node.draining

    def copy(self) -> MemoryDisk:
        """The same contents, watched by nobody."""
        other = MemoryDisk(lambda: 0, self.generation)
        other.term = self.term
        other.revision = self.revision
        other.nodes, other.placements = dict(self.nodes), dict(self.placements)
        other.tombs, other.holds = dict(self.tombs), dict(self.holds)
        return other

    def lose(self, node_id: NodeId) -> NodeIncarnation:
        """The key of a node is gone, though the node lives: old engines lose live leases."""
        self._world.note("store: lost the key of {}", node_id)
        lost = self.nodes.pop(node_id)
        self._invariants.promises_nothing(lost.incarnation)
        self.revision += 1
        return lost.incarnation

    def backup(self) -> Backup:
        return Backup(
            self.generation,
            self.revision,
            self.term,
            dict(self.nodes),
            dict(self.holds),
            self.witness,
            dict(self.placements),
            dict(self.tombs),
        )

    def restore(self, backup: Backup) -> None:
        """Put a backup back: the store alone, or its whole volume, with the witness.

        What the registry is to notice by itself in the first case, the operator tells it in the
        other: the generation is to be a higher one (P18).
        """
        self.restores += 1
        if self.restores % 2 == 0:
            self.least_generation = self.generation + 1
            self.witness = backup.witness
        self._world.note("store: restored from revision {} to {}", self.revision, backup.revision)
        self.generation, self.revision = backup.generation, backup.revision
        self.term = backup.term
        self.nodes = dict(backup.nodes)
        self.holds = dict(backup.holds)
        self.placements = dict(backup.placements)
        self.tombs = dict(backup.tombs)


class SimulatedStore:
    """The way from the registry to its disk and back."""

    NAME = "store"

    def __init__(self, world: World, network: Network, disk: WatchedDisk, faults: Faults) -> None:
        self._world = world
        self._network = network
        self._disk = disk
        self.slow = faults.slow_store
        self.unknown = faults.unknown_store_result
        # A registry waits so long for an outcome, then it is unknown.
        self.timeout_ms = 1_000

    def open(self) -> tuple[int, StoreView]:
        return self._disk.open(self._disk.least_generation)

    def commit(
        self,
        registry: Process,
        term: int,
        operations: tuple[StoreOperation, ...],
        answer: Callable[[Outcome], None],
    ) -> None:
        """Send a transaction; `answer` is called in the registry's life, if ever."""
        world, life, restores = self._world, registry.life, self._disk.restores

        def back(outcome: Outcome) -> None:
            if self._network.is_open(self.NAME, registry.name):
                world.after(
                    self._network.delay(),
                    lambda: (
                        registry.arrive(lambda: answer(outcome))
                        if life == registry.life and registry.alive
                        else None
                    ),
                )

        def apply() -> None:
            if self._disk.restores != restores:
                return  # It was on its way to a disk that is not there any more.
            outcome = self._disk.apply(term, operations)
            if not world.chance(self.unknown / 2):
                back(outcome)

        if world.chance(self.unknown / 2) or not self._network.is_open(registry.name, self.NAME):
            if world.chance(0.5):
                return  # It never gets there.
            world.after(world.between(300, 4_000), apply)
        elif world.chance(self.slow):
            world.after(world.between(200, 3_000), apply)
        else:
            world.after(world.between(0, 5), apply)

    def no_answer(self, operations: tuple[StoreOperation, ...]) -> Outcome:
        """What the driver makes of a time-out."""
        return Unknown()
