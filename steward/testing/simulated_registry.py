"""The registry process in the simulation: the real machine over a disk that outlives it."""

from collections.abc import Callable

from registry_service.core import commands as to_registry
from registry_service.core import effects as from_registry
from registry_service.core.config import RegistryConfig
from registry_service.core.registry import Registry
from registry_service.core.transactions import Committed as StoreCommitted
from registry_service.core.transactions import Unknown, UserPlaced
from registry_service.store.memory import MemoryDisk
from steward.testing.faults import WALL_MS, Faults
from steward.testing.invariants import Invariants
from steward.testing.world import Link, World


class SimulatedRegistry:
    """The registry process over its disk. Peers are numbers; what is sent to a lost one is lost."""

    def __init__(self, world: World, invariants: Invariants, faults: Faults) -> None:
        self._world = world
        self._invariants = invariants
        self._faults = faults
        self._disk = MemoryDisk(lambda: WALL_MS + world.now_ms)
        self._peers = 0
        self._life = 0
        self._receivers: dict[to_registry.PeerId, Callable[[from_registry.Message], None]] = {}
        self._links: dict[to_registry.PeerId, Link] = {}
        self.dial: Callable[[str], to_registry.DialOutcome] = lambda _: (
            to_registry.DialOutcome.ACCEPTED
        )
        self.restarted: list[Callable[[], None]] = []
        self.fences = 0
        self._start()

    def connect(self, receive: Callable[[from_registry.Message], None]) -> to_registry.PeerId:
        self._peers += 1
        peer = to_registry.PeerId(self._peers)
        self._receivers[peer] = receive
        self._links[peer] = Link(self._world, 0, 8)
        return peer

    def tell(self, command: to_registry.Command) -> None:
        """A command on its way; lost when the registry restarts meanwhile."""
        life = self._life
        self._world.after(
            self._world.random.randint(0, 6), self._while(life, lambda: self._handle(command))
        )

    def restart(self) -> None:
        self._receivers.clear()
        self._start()
        for reconnect in self.restarted:
            self._world.after(self._world.random.randint(50, 400), reconnect)

    def _while(self, life: int, action: Callable[[], None]) -> Callable[[], None]:
        """`action`, unless the process was restarted before it happens."""
        return lambda: action() if life == self._life else None

    def _start(self) -> None:
        self._life += 1
        self._machine = Registry(RegistryConfig())
        self._term, view = self._disk.open()
        self._handle(to_registry.Recover(view))

    def _handle(self, command: to_registry.Command) -> None:
        for effect in self._machine.handle(self._world.now_ms, command):
            self._perform(effect)
        deadline = self._machine.next_deadline()
        if deadline is not None:
            life = self._life
            self._world.at(deadline, lambda: self._tick(life))

    def _tick(self, life: int) -> None:
        deadline = self._machine.next_deadline()
        if life == self._life and deadline is not None and deadline <= self._world.now_ms:
            self._handle(to_registry.Tick())

    def _perform(self, effect: from_registry.Effect) -> None:
        life = self._life
        match effect:
            case from_registry.Commit():
                self._world.after(
                    self._world.random.randint(0, 5), lambda: self._commit(life, effect)
                )
            case from_registry.Send(peer, message):
                receiver = self._receivers.get(peer)
                if receiver is not None:
                    self._links[peer].send(self._while(life, lambda: receiver(message)))
            case from_registry.Close(peer):
                self._receivers.pop(peer, None)
            case from_registry.Dial(dial, address):
                outcome = self.dial(address)
                self._world.after(
                    2,
                    self._while(life, lambda: self._handle(to_registry.FinishDial(dial, outcome))),
                )
            case from_registry.NodeLost():
                self.fences += 1
            case _:
                pass

    def _commit(self, life: int, effect: from_registry.Commit) -> None:
        luck = self._world.random.random()
        lost = luck < self._faults.unknown_store_result
        if life != self._life or (lost and luck < self._faults.unknown_store_result / 2):
            outcome: object = Unknown()  # It never got there.
        else:
            outcome = self._disk.apply(self._term, effect.operations)
            if isinstance(outcome, StoreCommitted):
                for result in outcome.results:
                    if isinstance(result, UserPlaced) and result.created:
                        self._invariants.created(result.placement)
            if lost:
                outcome = Unknown()  # It was done, and the answer is lost.
        if life == self._life:
            self._handle(
                to_registry.FinishTransaction(effect.transaction, outcome)  # type: ignore[arg-type]
            )
