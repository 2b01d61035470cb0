"""The real cores of registry, managers, log and edges in one seeded world with faults (level S1).

`Simulation(seed).run()` plays a cluster: nodes, edges, users with several clients who send
messages, agents that think, call tools and answer; while processes die, stand still and
are cut off, disks are slow, results are lost, the store is restored from a backup, and operators
drain and move. Invariants are checked at every step; when the faults are over, liveness.

What is real: `Registry` on `MemoryDisk`, `GrantBook` and `Manager`, `LogState`, `Attachment` and
`EdgeSession`. What is played: their drivers, the network, agents and clients. `Parts` are the
places where a guard can be taken away (`mutations.py`): then some seed must break an invariant.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import orjson

from agent_service.log.memory import LogState
from registry_service.core import commands as to_registry
from steward.model.keys import StreamId, UserKey
from steward.testing.faults import STRICT_TENANT, Faults
from steward.testing.invariants import InvariantBroken, Invariants
from steward.testing.simulated_client import SimulatedClient
from steward.testing.simulated_edge import SimulatedEdge
from steward.testing.simulated_host import SimulatedHost
from steward.testing.simulated_log import SimulatedLog
from steward.testing.simulated_network import Network, Process
from steward.testing.simulated_node import SimulatedNode
from steward.testing.simulated_operator import SimulatedOperator
from steward.testing.simulated_registry import SimulatedRegistry
from steward.testing.simulated_store import SimulatedStore, WatchedDisk
from steward.testing.world import Action, World

BOUND_MS = 60_000
"""L1: so long after the last fault everything that was started is over."""
LOOK_MS = 500
TENANTS = ("default", STRICT_TENANT)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a simulation is made of, where a guard can be missing."""

    log_state: Callable[[Callable[[], StreamId]], LogState] = LogState
    log: type[SimulatedLog] = SimulatedLog
    disk: type[WatchedDisk] = WatchedDisk
    store: type[SimulatedStore] = SimulatedStore
    host: type[SimulatedHost] = SimulatedHost
    node: type[SimulatedNode] = SimulatedNode
    edge: type[SimulatedEdge] = SimulatedEdge


class Simulation:
    """One seed. `run` raises InvariantBroken with the step at which something was seen broken."""

    def __init__(
        self,
        seed: int,
        *,
        users: int = 4,
        nodes: int = 3,
        edges: int = 2,
        clients: int = 2,
        faults: Faults | None = None,
        parts: Parts | None = None,
    ) -> None:
        parts = parts or Parts()
        self.seed = seed
        self.world = World(seed)
        self.invariants = Invariants(lambda: self.world.now_ms)
        self.faults = faults if faults is not None else Faults.of(seed)
        world, network = self.world, Network(self.world)
        self.network = network
        numbers = iter(range(1, 1_000_000))
        state = parts.log_state(lambda: StreamId(f"stream-{next(numbers):08d}"))
        self.log = parts.log(world, network, state, self.invariants, self.faults, self._rate())
        self.disk = parts.disk(world, self.invariants)
        self.registry = SimulatedRegistry(
            world, network, self.disk, parts.store, self.invariants, self.faults, self._rate()
        )
        self.nodes = {
            f"node-{i}": parts.node(
                f"node-{i}",
                world,
                network,
                self.registry,
                self.log,
                parts.host,
                self.invariants,
                self.faults,
                self._rate(),
            )
            for i in range(nodes)
        }
        self.edges = [
            parts.edge(
                f"edge-{i}",
                world,
                network,
                self.registry,
                self.nodes,
                self.invariants,
                self._rate(),
            )
            for i in range(edges)
        ]
        self.operator = SimulatedOperator(world, network, self.registry)
        self.users = [UserKey(TENANTS[i % 2], f"user-{i}") for i in range(users)]
        self.clients = [
            SimulatedClient(f"{user.user}/{i}", user, world, network, self.edges, self.invariants)
            for user in self.users
            for i in range(clients)
        ]
        self.registry.dial = self._dial
        for node in self.nodes.values():
            node.ended = self._node_ended
        self._backups = [self.disk.backup()]
        self._busy_until = 0

    def _rate(self) -> int:
        drift = self.faults.clock_drift
        return 1000 + self.world.between(-drift, drift)

    def trace(self) -> str:
        """What happened, as one line: equal for equal seeds."""
        digest = hashlib.blake2b(digest_size=8)
        for user in self.users:
            for payload in self.invariants.events(user):
                digest.update(payload)
        return (
            f"steps={self.world.steps} checks={self.invariants.counts.total()} "
            f"fences={self.registry.fences} refused={self.log.fenced} {digest.hexdigest()}"
        )

    def again(self) -> str:
        """The line that plays this seed again."""
        return f"make simulate SEED={self.seed} N=1"

    # ---- playing

    def run(self, *, busy_ms: int = 20_000) -> None:
        """Play: messages and faults for `busy_ms`, then only recovery until all is well, or L1."""
        world = self.world
        end_ms = self._busy_until = world.now_ms + busy_ms
        try:
            self._begin()
            world.run(end_ms)
            self._calm()
            while not self._settled():
                if world.now_ms >= end_ms + BOUND_MS:
                    self._explain()
                world.run(world.now_ms + LOOK_MS)
            self._check_end()
        except InvariantBroken as broken:
            text = f"seed {self.seed}, step {world.steps}: {broken}"
            found = InvariantBroken(broken.name, text)
            found.args = (text,)
            raise found from None

    def _begin(self) -> None:
        faults, world = self.faults, self.world
        self.network.slow = faults.slow_network
        self.log.start()
        self.registry.start()
        for process in (*self.nodes.values(), *self.edges, self.operator, *self.clients):
            process.start()
        for client in self.clients:
            self._talk(client)
        for user in self.users:
            self._often(4_000, lambda user=user: self._go_away(user))  # type: ignore[misc]
        self._often(2_000, lambda: self._backups.append(self.disk.backup()))
        self._often(faults.node_kill_ms, lambda: self._node().crash())
        self._often(faults.machine_loss_ms, lambda: self._node().crash(silent=True))
        self._often(faults.edge_kill_ms, lambda: world.random.choice(self.edges).crash())
        self._often(faults.registry_restart_ms, lambda: self._restart(self.registry))
        self._often(faults.log_restart_ms, lambda: self._restart(self.log))
        self._often(faults.node_pause_ms, lambda: self._pause(self._node()))
        others = (*self.edges, self.registry, self.log)
        self._often(faults.other_pause_ms, lambda: self._pause(world.random.choice(others)))
        self._often(faults.partition_ms, self._partition)
        self._often(faults.stream_reset_ms, self._reset)
        self._often(faults.spurious_loss_ms, self._lose_lease)
        self._often(faults.restore_ms, self._restore)
        self._often(faults.suspend_ms, self._suspend)
        self._often(faults.drain_ms, self._drain)
        self._often(faults.move_ms, self._move)
        self._often(faults.evict_ms, lambda: self.operator.evict(world.random.choice(self.users)))
        self._often(faults.operator_fence_ms, lambda: self.operator.fence(self._node()))

    def _often(self, mean_ms: int, happens: Action) -> None:
        """While the world is busy, at times of its own."""
        if not mean_ms:
            return
        world = self.world

        def strike() -> None:
            if world.now_ms < self._busy_until:
                happens()
                world.after(world.between(1, 2 * mean_ms), strike)

        world.after(world.between(1, 2 * mean_ms), strike)

    def _talk(self, client: SimulatedClient) -> None:
        world = self.world

        def say() -> None:
            if world.now_ms < self._busy_until:
                if world.chance(0.06):
                    client.cancel()
                else:
                    client.message()
                world.after(world.between(100, 2_200), say)

        world.after(world.between(0, 500), say)

    def _go_away(self, user: UserKey) -> None:
        """A user closes every window, or one, and comes back."""
        mine = [client for client in self.clients if client.user == user]
        leaving = mine if self.world.chance(0.6) else mine[:1]
        for client in leaving:
            client.leave()
            wait_ms = self.world.between(500, 7_000)
            self.world.after(wait_ms, client.come_back)

    # ---- what goes wrong

    def _node(self) -> SimulatedNode:
        return self.world.random.choice(tuple(self.nodes.values()))

    def _node_ended(self, node: SimulatedNode, what: str) -> None:
        world = self.world
        wait_ms = world.between(2_000, 7_000) if what == "machine" else world.between(300, 1_500)
        world.after(wait_ms, node.start)
        if what == "process" and world.chance(self.faults.death_report):
            self.operator.report_death(node, node.pid)

    def _restart(self, process: Process) -> None:
        if process.alive:
            process.crash()
            self.world.after(self.world.between(20, 1_500), process.start)

    def _pause(self, process: Process) -> None:
        longest = self.faults.longest_pause_ms
        scale = self.world.random.choice((1, 1, 8))
        process.pause(self.world.between(10, max(longest // scale, 10)))

    def _suspend(self) -> None:
        """A machine sleeps: its processes stand still, and their clocks have gone on further."""
        processes: tuple[Process, ...] = (*self.nodes.values(), *self.edges, self.registry)
        process = self.world.random.choice(processes)
        self.world.note("{}: its clock jumps", process.name)
        process.clock.jump(self.world.between(500, 12_000))

    def _partition(self) -> None:
        world = self.world
        node, edge = self._node().name, world.random.choice(self.edges).name
        pair = world.random.choice(
            (
                (edge, "registry"),
                (edge, node),
                (edge, node),
                (node, "registry"),
                (node, "registry"),
                (node, "log"),
                ("registry", "store"),
            )
        )
        scale = world.random.choice((1, 3, 10))
        for_ms = world.between(50, max(self.faults.longest_partition_ms // scale, 60))
        if world.chance(0.5):
            pair = pair[::-1]
        self.network.block(*pair, for_ms)
        if world.chance(0.5):
            self.network.block(*pair[::-1], for_ms)

    def _reset(self) -> None:
        if self.network.streams:
            self.world.random.choice(tuple(self.network.streams)).reset()

    def _lose_lease(self) -> None:
        """The store has lost the key of a node that lives."""
        nodes = tuple(self.disk.nodes)
        if nodes:
            lost = self.disk.lose(self.world.random.choice(nodes))
            wait_ms = self.world.between(5, 3_000)
            self.world.after(wait_ms, lambda: self.registry.watch(lost))

    def _restore(self) -> None:
        self.registry.crash()
        self.disk.restore(self.world.random.choice(self._backups))
        self._backups = [self.disk.backup()]
        self.world.after(self.world.between(20, 1_500), self.registry.start)

    def _drain(self) -> None:
        self.operator.drain(self._node(), self.world.between(500, 6_000))

    def _move(self) -> None:
        self.operator.move(self.world.random.choice(self.users), self._node())

    def _dial(self, address: str) -> to_registry.DialOutcome | None:
        node = self.nodes[address.partition(":")[0]]
        there = self.network.is_open("registry", node.name)
        if node.silent or not there or not self.network.is_open(node.name, "registry"):
            return None
        outcome = to_registry.DialOutcome
        return outcome.ACCEPTED if node.alive else outcome.REFUSED

    def _calm(self) -> None:
        """Nothing goes wrong from now on; what is dead is started again as it always is."""
        world = self.world
        world.note("the faults are over")
        self.network.heal()
        self.log.slow = self.registry.store.slow = self.registry.store.unknown = 0.0
        for process in (self.registry, self.log, *self.edges, *self.nodes.values()):
            if process.alive and process.paused_until > world.now_ms:
                process.wake()
        for client in self.clients:
            client.come_back()

    # ---- how it ends

    def _settled(self) -> bool:
        for client in self.clients:
            if not client.ready or client.pending:
                return False
            if client.position != len(self.invariants.events(client.user)):
                return False
        return all(not self.invariants.open_runs(user) for user in self.users)

    def _explain(self) -> None:
        """L1 is broken: say for whom."""
        for client in self.clients:
            stored = len(self.invariants.events(client.user))
            fine = client.ready and not client.pending and client.position == stored
            text = "{}: ready {}, waits for {}, saw {} of {}"
            waits = sorted(client.pending)
            self.invariants.require(
                "L1", fine, text, client.name, client.ready, waits, client.position, stored
            )
        for user in self.users:
            open_runs = self.invariants.open_runs(user)
            self.invariants.require("L1", not open_runs, "{}: {} never end", user, open_runs)

    def _check_end(self) -> None:
        """L1: every message that was accepted is there once, with one run that has one end."""
        require = self.invariants.require
        for user in self.users:
            events = [orjson.loads(payload) for payload in self.invariants.events(user)]
            ids = [event["data"]["id"] for event in events if event["type"] == "user_message"]
            require("L1", len(ids) == len(set(ids)), "{}: a message is there twice", user)
            mine = [client for client in self.clients if client.user == user]
            for id in (id for client in mine for id in client.accepted_ids):
                require("L1", id in ids, "{}: {} was accepted and is not there", user, id)
            ended = [event["run_id"] for event in events if event["type"] == "agent_completed"]
            require("L1", len(ended) == len(set(ended)), "{}: a run ended twice", user)
            text = "{}: {} messages and {} ends"
            require("L1", len(ended) == len(ids), text, user, len(ids), len(ended))
