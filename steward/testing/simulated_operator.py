"""Operators and supervisors in the simulation: who reports a death, drains a node, moves a user."""

from typing import Any

from registry_service.core import commands as to_registry
from steward.model.keys import UserKey
from steward.testing.simulated_network import End, Network, Process, Uplink
from steward.testing.simulated_node import SimulatedNode
from steward.testing.simulated_registry import Say, SimulatedRegistry
from steward.testing.world import World


class SimulatedOperator(Process):
    """One stream to the registry, over which everything of this kind is asked."""

    def __init__(self, world: World, network: Network, registry: SimulatedRegistry) -> None:
        super().__init__(world, network, "operator")
        self._registry = registry

    def begin(self) -> None:
        self._uplink = Uplink(
            self, lambda: (self._registry, "operator"), up=lambda: None, message=lambda _: None
        )

    def accepted(self, end: End, hello: Any) -> None:
        raise NotImplementedError

    def report_death(self, node: SimulatedNode, pid: int) -> None:
        """Evidence A: the process was reaped."""
        self.after(
            self.world.between(1, 20),
            lambda: self._ask(
                lambda peer: to_registry.ReportDeath(peer, node.node_id, pid, "exit 9")
            ),
        )

    def drain(self, node: SimulatedNode, stop_ms: int) -> None:
        """Move everybody away from a node, which is then stopped and started again."""
        if node.alive:
            life = node.life
            self._ask(lambda peer: to_registry.DrainNode(peer, node.node_id))
            self.after(stop_ms, lambda: node.crash() if node.life == life else None)

    def move(self, user: UserKey, node: SimulatedNode) -> None:
        """Move one user, to this node."""
        self._ask(lambda peer: to_registry.MoveUser(peer, user, node.node_id))

    def evict(self, user: UserKey) -> None:
        """End all that there is of a user; who is still allowed to comes back."""
        self._ask(lambda peer: to_registry.EvictUser(peer, user, "asked for"))

    def fence(self, node: SimulatedNode) -> None:
        """Evidence E."""
        self._ask(lambda peer: to_registry.FenceNodeByOperator(peer, node.node_id, "asked for"))

    def _ask(self, say: Say) -> None:
        self._uplink.send(say)
