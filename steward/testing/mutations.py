"""The guards of the ownership protocol, each with parts from which it is missing.

Nothing here is known to the services: a guard is taken away by a part of the simulation that
behaves as the part without it would. With any one missing, some seed must break an invariant
(`tests/simulation`), which is what makes a simulation without a finding worth something.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from agent_service.core import effects as from_manager
from agent_service.core.journal import (
    Append,
    AppendOutcome,
    Seal,
    Sealed,
    SealOutcome,
)
from agent_service.log.memory import LogState
from edge.core.attachment import Attachment
from registry_service.core.transactions import (
    Outcome,
    PlacementReleased,
    PlaceUser,
    ReleasePlacement,
    StoreOperation,
    TargetRefused,
    UserPlaced,
)
from steward.model.keys import NodeIncarnation, Sequence, make_epoch
from steward.model.placement import Placement
from steward.testing.faults import Faults
from steward.testing.simulated_agent import PlayedRun
from steward.testing.simulated_edge import SimulatedEdge
from steward.testing.simulated_host import Live, SimulatedHost
from steward.testing.simulated_log import SimulatedLog
from steward.testing.simulated_node import SimulatedNode
from steward.testing.simulated_store import SimulatedStore, WatchedDisk
from steward.testing.simulation import Parts, Simulation


class LogWithoutFence(LogState):
    """Takes an append of any epoch."""

    def append(self, append: Append) -> AppendOutcome:
        stream = self._streams.get(append.user)
        if stream is not None and append.epoch < stream.fence:
            append = append._replace(
                epoch=stream.fence,
                append_number=stream.last_append_number + 1,
                expected_sequence=Sequence(len(stream.events) + 1),
            )
        return super().append(append)


class LogWithoutExpectedSequence(LogState):
    """Takes an append whatever its writer has seen: a repeat, too, is written as if it were new."""

    def append(self, append: Append) -> AppendOutcome:
        stream = self._streams.get(append.user)
        if stream is not None:
            append = append._replace(
                append_number=stream.last_append_number + 1,
                expected_sequence=Sequence(len(stream.events) + 1),
            )
        return super().append(append)


class LogThatReadsBeforeItSeals(SimulatedLog):
    """Reads for a seal first and raises the fence later: the old manager writes in between."""

    READ_EARLIER_MS = 40

    def begin(self) -> None:
        super().begin()
        self._read: dict[tuple[str, str], SealOutcome] = {}

    def _take(self, end: Any, number: int, operation: Append | Seal) -> None:
        if isinstance(operation, Seal):
            # What a seal of its own epoch would read now, without raising anything.
            copy = LogState(self.state._make_stream_id)
            stream = self.state._streams.get(operation.user)
            if stream is not None:
                copy._streams[operation.user] = stream.copy()
                self._read[str(operation.user), operation.activation] = copy.seal(operation)
            self.after(
                self.READ_EARLIER_MS, lambda: SimulatedLog._take(self, end, number, operation)
            )
        else:
            super()._take(end, number, operation)

    def seal(self, seal: Seal) -> SealOutcome:
        read = self._read.pop((str(seal.user), seal.activation), None)
        outcome = self.state.seal(seal)
        if isinstance(outcome, Sealed):
            if isinstance(read, Sealed):
                outcome = dataclasses.replace(
                    outcome, next_sequence=read.next_sequence, records=read.records
                )
            self._invariants.sealed(seal, outcome)
        return outcome


class HostThatShowsBeforeItStores(SimulatedHost):
    """Delivers what it sends to the log without waiting for the answer."""

    def write(self, live: Live, effect: from_manager.WriteAppend) -> None:
        append = effect.append
        if append.events:
            payloads = tuple(event.payload for event in append.events)
            first = append.expected_sequence
            last = Sequence(first + len(payloads) - 1)
            edges = live.manager.edges
            super().deliver(live, from_manager.Deliver(edges, first, last, payloads))
        super().write(live, effect)

    def deliver(self, live: Live, effect: from_manager.Deliver) -> None:
        pass


class EagerRun(PlayedRun):
    """Starts a tool as soon as it has announced it."""

    def announce(self, number: int, start: Callable[[], None]) -> None:
        self._node.after(1, start)


class HostOfEagerRuns(SimulatedHost):
    run = EagerRun


class EdgeThatTakesAnyEpoch(SimulatedEdge):
    """Takes the deliveries of every manager that still talks to it."""

    def takes(self, attachment: Attachment, source: NodeIncarnation, epoch: int) -> bool:
        return True


class NodeThatGoesOn(SimulatedNode):
    """Knows that it is fenced, and goes on."""

    def fence(self, cause: str) -> None:
        self.invariants.knows_fenced(self.process, cause)

    def is_silent(self) -> bool:
        super().is_silent()
        return False


class DiskThatPlacesAnywhere(WatchedDisk):
    """Places a user where the registry says, without looking whether that node lives."""

    def _place(self, operation: PlaceUser) -> UserPlaced | TargetRefused:
        placed = super()._place(operation)
        if isinstance(placed, UserPlaced):
            return placed
        self.revision += 1
        target = operation.target
        epoch = make_epoch(self.generation, self.revision)
        address = f"{target.node_id}:1"
        placement = Placement(operation.user, epoch, target.node_id, target.node_rev, address)
        self.placements[operation.user] = placement
        return UserPlaced(placement, True)


class DiskThatDeletesWithoutLooking(WatchedDisk):
    """Deletes the placement of a user whatever its epoch is."""

    def _release(self, operation: ReleasePlacement) -> PlacementReleased:
        current = self.placements.get(operation.user)
        if current is None:
            return super()._release(operation)
        self.revision += 1
        del self.placements[operation.user]
        return PlacementReleased(True, None)


class StoreThatTakesSilenceForSuccess(SimulatedStore):
    """Tells the registry that a transaction without an answer was committed."""

    def no_answer(self, operations: tuple[StoreOperation, ...]) -> Outcome:
        disk = self._disk.copy()
        return disk.apply(disk.term, operations)


@dataclass(frozen=True, slots=True)
class Guard:
    """What a guard does, a simulation without it, and the faults that it is there for."""

    text: str
    parts: Parts
    provoked_by: Mapping[str, int | float] = field(default_factory=lambda: MappingProxyType({}))

    def simulation(self, seed: int) -> Simulation:
        """A world without the guard."""
        faults = dataclasses.replace(Faults.of(seed), **self.provoked_by)  # type: ignore[arg-type]
        return Simulation(seed, faults=faults, parts=self.parts)


GUARDS: dict[str, Guard] = {
    "fence": Guard(
        "the log takes an append under the sealed epoch alone",
        Parts(log_state=LogWithoutFence),
        MappingProxyType({"node_pause_ms": 2_500, "spurious_loss_ms": 5_000}),
    ),
    "expected-sequence": Guard(
        "the log takes an append behind what its writer has seen alone",
        Parts(log_state=LogWithoutExpectedSequence),
        MappingProxyType({"log_restart_ms": 2_000, "stream_reset_ms": 2_000}),
    ),
    "atomic-seal": Guard(
        "the log raises the fence and reads the start in one step",
        Parts(log=LogThatReadsBeforeItSeals),
    ),
    "append-before-deliver": Guard(
        "nothing is delivered that the log has not acknowledged",
        Parts(host=HostThatShowsBeforeItStores),
    ),
    "intent-before-tool": Guard(
        "a tool starts when its tool_executing is in the log",
        Parts(host=HostOfEagerRuns),
    ),
    "edge-epoch": Guard(
        "an edge takes deliveries of the epoch it is attached to alone",
        Parts(edge=EdgeThatTakesAnyEpoch),
        MappingProxyType({"move_ms": 1_000, "node_pause_ms": 3_000, "slow_network": 0.2}),
    ),
    "self-fencing": Guard(
        "a node that knows that it is over ends",
        Parts(node=NodeThatGoesOn),
    ),
    "guarded-commit": Guard(
        "the store places nobody on an incarnation that is gone or draining",
        Parts(disk=DiskThatPlacesAnywhere),
    ),
    "unknown-result": Guard(
        "a result of the store that did not come is asked for again",
        Parts(store=StoreThatTakesSilenceForSuccess),
        MappingProxyType({"unknown_store_result": 0.1}),
    ),
    "compare-and-delete": Guard(
        "a release deletes the placement of its own epoch alone",
        Parts(disk=DiskThatDeletesWithoutLooking),
        MappingProxyType({"move_ms": 1_000, "unknown_store_result": 0.1}),
    ),
}
