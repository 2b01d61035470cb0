"""The registry process in the simulation: the real machine over a disk that outlives it.

The driver keeps the rules of `registry_service.driver`: commands one by one, effects in order, a
timer for the next deadline. The store answers late, not at all, or after its caller has given
up; then the machine is told that the result is unknown, whatever becomes of it.
"""

from collections.abc import Callable

from registry_service.core import commands as to_registry
from registry_service.core import effects as from_registry
from registry_service.core.config import RegistryConfig
from registry_service.core.registry import Registry
from registry_service.core.transactions import Outcome, StoreOperation
from registry_service.store.memory import MemoryDisk
from steward.model.keys import NodeIncarnation
from steward.model.placement import Placement
from steward.testing.faults import STRICT_TENANT, Faults
from steward.testing.invariants import Invariants
from steward.testing.simulated_network import End, Network, Process
from steward.testing.simulated_store import SimulatedStore
from steward.testing.world import World

MOST_TICKS = 50
"""So many timers at one moment are a loop that keeps a core busy."""

Say = Callable[[to_registry.PeerId], to_registry.Command]
"""A message to the registry: the sender does not know the number that it has there."""


class SimulatedRegistry(Process):
    """The registry process. Streams are opened with "node", "edge" or "operator"."""

    def __init__(
        self,
        world: World,
        network: Network,
        disk: MemoryDisk,
        store: Callable[..., SimulatedStore],
        invariants: Invariants,
        faults: Faults,
        rate: int,
    ) -> None:
        super().__init__(world, network, "registry", rate)
        self.config = RegistryConfig(strict_tenants=frozenset({STRICT_TENANT}))
        self.disk = disk
        self.store = store(world, network, disk, faults)
        self.fences = 0
        self._invariants = invariants
        self._peers = 0
        # What each edge asked for last, for the checks: nobody else looks at it.
        self._asked: dict[tuple[to_registry.PeerId, int], to_registry.ResolveManagers] = {}
        self.dial: Callable[[str], to_registry.DialOutcome | None] = lambda _: None

    def begin(self) -> None:
        self._ends: dict[to_registry.PeerId, End] = {}
        self._asked.clear()
        self._timer: int | None = None
        self._ticks = self._ticked_ms = 0
        self._machine = Registry(self.config)
        self._term, view = self.store.open()
        self._handle(to_registry.Recover(view))

    def accepted(self, end: End, hello: str) -> None:
        self._peers += 1
        peer = to_registry.PeerId(self._peers)
        self._ends[peer] = end
        end.on_message = lambda say: self._told(say(peer))
        end.on_end = lambda: self._lost(peer, hello)

    def watch(self, incarnation: NodeIncarnation) -> None:
        """The store's watch says that a node key is gone (P14).

        The engines that exist lose no keys and have no watch, so that the machine has no command
        for it yet: its word goes to the part that hears of lost keys when it places somebody.
        """
        if self.alive:
            self.arrive(lambda: self._gone(incarnation))

    def _gone(self, incarnation: NodeIncarnation) -> None:
        self._machine._fencing.gone(incarnation)
        self._handle(to_registry.Tick())

    def _lost(self, peer: to_registry.PeerId, hello: str) -> None:
        self._ends.pop(peer, None)
        if hello == "node":
            self._handle(to_registry.CloseNodeSession(peer, to_registry.StreamEnd.RESET))
        elif hello == "edge":
            self._handle(to_registry.CloseEdgeSession(peer))

    def _told(self, command: to_registry.Command) -> None:
        if isinstance(command, to_registry.ResolveManagers):
            self._asked[command.peer, command.request_id] = command
        elif isinstance(command, to_registry.FenceNodeByOperator):
            node = self.disk.nodes.get(command.node_id)
            if node is not None:
                self._invariants.promises_nothing(node.incarnation)
        self._handle(command)

    def _handle(self, command: to_registry.Command) -> None:
        life = self.life
        for effect in self._machine.handle(self.clock.now(), command):
            self._perform(effect)
            if life != self.life:
                return
        deadline = self._machine.next_deadline()
        if deadline is not None and (self._timer is None or deadline < self._timer):
            self._timer = deadline
            self.after(max(deadline - self.clock.now(), 0), lambda: self._tick(deadline))

    def _tick(self, due: int) -> None:
        if self._timer == due:
            self._timer = None
            now = self.clock.now()
            self._ticks = self._ticks + 1 if now == self._ticked_ms else 0
            self._ticked_ms = now
            text = "the registry asks for its timer again and again"
            self._invariants.require("L1", self._ticks < MOST_TICKS, text)
            self._handle(to_registry.Tick())

    def _perform(self, effect: from_registry.Effect) -> None:
        match effect:
            case from_registry.Commit():
                self._commit(effect.transaction, effect.operations)
            case from_registry.Send(peer, message):
                end = self._ends.get(peer)
                if end is not None:
                    self._check(peer, message)
                    end.send(message)
                    if isinstance(message, from_registry.Refused):
                        self._close(peer)
            case from_registry.Close(peer):
                self._close(peer)
            case from_registry.Dial(dial, address):
                self._dial(dial, address)
            case from_registry.Halt(cause):
                self.world.note("registry: must end: {}", cause)
                self.crash()
                self.world.after(300, self.start)
            case from_registry.NodeLost(incarnation, cause):
                self.fences += 1
                self.world.note("registry: {} is fenced: {}", incarnation, cause)
            case _:
                pass

    def _close(self, peer: to_registry.PeerId) -> None:
        end = self._ends.pop(peer, None)
        if end is not None:
            end.close()

    def _dial(self, dial: to_registry.DialId, address: str) -> None:
        """No answer is a time-out: of this process, so also when it is cut off itself."""
        outcome = self.dial(address)
        wait_ms = self.network.delay() * 2
        if outcome is None:
            outcome, wait_ms = to_registry.DialOutcome.TIMED_OUT, 500
        finished = to_registry.FinishDial(dial, outcome)
        self.after(wait_ms, lambda: self._handle(finished))

    def _commit(
        self, transaction: to_registry.TransactionId, operations: tuple[StoreOperation, ...]
    ) -> None:
        def finish(outcome: Outcome) -> None:
            self.world.note("registry: transaction {}: {}", transaction, type(outcome).__name__)
            self._handle(to_registry.FinishTransaction(transaction, outcome))

        open_ = [True]

        def answered(outcome: Outcome) -> None:
            if open_[0]:
                open_[0] = False
                finish(outcome)

        self.store.commit(self, self._term, operations, answered)
        self.after(self.store.timeout_ms, lambda: answered(self.store.no_answer(operations)))

    def _check(self, peer: to_registry.PeerId, message: from_registry.Message) -> None:
        match message:
            case from_registry.ManagersResolved(request_id, results):
                asked = self._asked[peer, request_id]
                indexes = message.indexes or range(len(results))
                for index, result in zip(indexes, results, strict=True):
                    if isinstance(result, Placement):
                        self._invariants.resolved(result, asked.queries[index].min_epoch)
                if not message.more:
                    del self._asked[peer, request_id]
            case from_registry.PlacementsGranted(placements):
                for placement in placements:
                    self._invariants.resolved(placement, 0)
            case from_registry.PlacementsConfirmed(_, placements):
                for placement in placements:
                    self._invariants.resolved(placement, 0)
            case _:
                pass
