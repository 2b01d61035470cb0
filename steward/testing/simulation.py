"""The real cores of registry, managers and log in one seeded world with faults (level S1).

`Simulation(seed).run()` plays a cluster of nodes, users who send messages and agents that
answer, while nodes are killed and paused, the registry and the log process restart, and
store results are lost. Invariants are checked at every step, and liveness at the end:
after the faults, every message has its run and every run exactly one end.

What is real: `Registry` on `MemoryDisk`, `GrantBook` and `Manager`, `LogState`. What is
played: the host (activation, appends, resends), the edge (attach, catch-up, epoch
check) and the agents. A guard can be taken away by replacing a part (see `LogState`
subclasses in the tests): then some seed must break an invariant.
"""

import hashlib
from collections.abc import Callable

import orjson

from agent_service.core.commands import SubmitMessage
from agent_service.log.memory import LogState
from registry_service.core import commands as to_registry
from steward.client.checks import check_stream
from steward.model.keys import StreamId, ThreadId, UserKey
from steward.testing.faults import EDGE, TRACE, Faults
from steward.testing.invariants import InvariantBroken, Invariants
from steward.testing.simulated_edge import SimulatedEdge
from steward.testing.simulated_log import SimulatedLog
from steward.testing.simulated_node import SimulatedNode
from steward.testing.simulated_registry import SimulatedRegistry
from steward.testing.world import World


class Simulation:
    """One seed. `run` raises InvariantBroken with the step at which something was seen broken."""

    def __init__(
        self,
        seed: int,
        *,
        users: int = 4,
        nodes: int = 3,
        faults: Faults | None = None,
        log: Callable[[Callable[[], StreamId]], LogState] = LogState,
    ) -> None:
        self.seed = seed
        self.world = World(seed)
        self.invariants = Invariants()
        self.faults = faults or Faults()
        numbers = iter(range(1, 1_000_000))
        state = log(lambda: StreamId(f"stream-{next(numbers):08d}"))
        self.log = SimulatedLog(self.world, state, self.invariants)
        self.registry = SimulatedRegistry(self.world, self.invariants, self.faults)
        self.nodes = {
            f"node-{i}": SimulatedNode(f"node-{i}", self.world, self.registry, self.log)
            for i in range(nodes)
        }
        by_address = {node.address: node for node in self.nodes.values()}

        def dial(address: str) -> to_registry.DialOutcome:
            alive = by_address[address].alive
            outcome = to_registry.DialOutcome
            return outcome.ACCEPTED if alive else outcome.REFUSED

        self.registry.dial = dial
        self.edge = SimulatedEdge(self.world, self.registry, self.log, self.nodes, self.invariants)
        self.users = [UserKey("default", f"user-{i}") for i in range(users)]
        self.sent: dict[UserKey, int] = dict.fromkeys(self.users, 0)

    def trace(self) -> str:
        """What happened, as one line: equal for equal seeds."""
        digest = hashlib.blake2b(digest_size=8)
        for user in self.users:
            for payload in self.invariants.events(user):
                digest.update(payload)
        return (
            f"steps={self.world.steps} checks={self.invariants.checked} "
            f"fences={self.registry.fences} refused={self.log.fenced} {digest.hexdigest()}"
        )

    def run(self, *, busy_ms: int = 15_000, quiet_ms: int = 25_000) -> None:
        """Play: messages and faults for `busy_ms`, then only recovery for `quiet_ms`, then look."""
        end_ms = self.world.now_ms + busy_ms
        for user in self.users:
            self._message_at(user, end_ms)
        self._poke_until(end_ms + quiet_ms)
        self._every(self.faults.kill_ms, end_ms, self._kill)
        self._every(self.faults.pause_ms, end_ms, self._pause)
        self._every(self.faults.registry_restart_ms, end_ms, self.registry.restart)
        self._every(self.faults.log_restart_ms, end_ms, self.log.restart)
        try:
            self.world.run(end_ms + quiet_ms, lambda: None)
            self._check_end()
        except InvariantBroken as broken:
            raise InvariantBroken(f"seed {self.seed}, step {self.world.steps}: {broken}") from None

    def _message_at(self, user: UserKey, end_ms: int) -> None:
        def send() -> None:
            if self.world.now_ms >= end_ms:
                return
            self.sent[user] += 1
            number = self.sent[user]
            thread = ThreadId(self.world.random.choice(("main", "main", "side")))
            self.edge.send(
                user,
                SubmitMessage(EDGE, number, f"m{number}", b'"hello"', thread, "", "", TRACE),
            )
            self.world.after(self.world.random.randint(50, 900), send)

        self.world.after(self.world.random.randint(0, 300), send)

    def _poke_until(self, end_ms: int) -> None:
        def poke() -> None:
            self.edge.poke()
            if self.world.now_ms < end_ms - 2_000:
                self.world.after(400, poke)

        self.world.after(400, poke)

    def _every(self, mean_ms: int, end_ms: int, fault: Callable[[], None]) -> None:
        if not mean_ms:
            return

        def strike() -> None:
            if self.world.now_ms < end_ms:
                fault()
                self.world.after(self.world.random.randint(1, 2 * mean_ms), strike)

        self.world.after(self.world.random.randint(1, 2 * mean_ms), strike)

    def _kill(self) -> None:
        self.world.random.choice(list(self.nodes.values())).kill()

    def _pause(self) -> None:
        node = self.world.random.choice(list(self.nodes.values()))
        node.pause(self.world.random.randint(10, self.faults.longest_pause_ms))

    def _check_end(self) -> None:
        """L1: after the faults every message is accepted and every run has one end."""
        for user in self.users:
            attachment = self.edge.attachments.get(user)
            if attachment is None:
                continue
            if attachment.pending:
                raise InvariantBroken(f"L1: {user} waits for {sorted(attachment.pending)}")
            events = [orjson.loads(payload) for payload in self.invariants.events(user)]
            ids = [e["data"]["id"] for e in events if e["type"] == "user_message"]
            if sorted(ids) != sorted(attachment.accepted):
                raise InvariantBroken(f"L1: {user} has {len(ids)} messages for {len(set(ids))} ids")
            ended = sum(event["type"] == "agent_completed" for event in events)
            if ended != len(ids):
                raise InvariantBroken(f"L1: {user} has {len(ids)} messages and {ended} ends")
            if attachment.position != len(events):
                raise InvariantBroken(f"L1: {user} saw {attachment.position} of {len(events)}")
            findings = check_stream(events)
            if findings:
                raise InvariantBroken(f"order: {user}: {findings[0]}")
