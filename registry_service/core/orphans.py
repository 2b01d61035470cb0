"""Users who have an open run and no manager: placed without an edge that asks (P20).

Nodes find them in the log's index and name them here; one who was handed off when no other node
could take a user comes from `Releases` at once. Guarantees: each is placed if nobody
else placed it, and its node is told to make the manager at once, also if it has the placement
already; connected users come first, since only a few orphans are placed at a time. What is
not answered in time, or does not fit the queue, is dropped: the nodes name it again.
"""

from registry_service.core.config import RegistryConfig
from registry_service.core.effects import UserRefused
from registry_service.core.node import NodeTable
from registry_service.core.resolver import Resolver
from registry_service.core.turn import Turn
from steward.model.keys import UserKey
from steward.model.placement import Placement


class Orphans:
    """A queue without repetition, and how many of it are being placed."""

    def __init__(
        self, config: RegistryConfig, turn: Turn, nodes: NodeTable, resolver: Resolver
    ) -> None:
        self._config = config
        self._turn = turn
        self._nodes = nodes
        self._resolver = resolver
        self._waiting: dict[UserKey, None] = {}
        self._placing = 0

    def adopt(self, users: tuple[UserKey, ...]) -> None:
        """Take users that a node named, or let go of."""
        for user in users:
            if len(self._waiting) < self._config.most_orphans:
                self._waiting[user] = None
        self.go_on()

    def go_on(self) -> None:
        """Place the next ones while there is room."""
        while self._waiting and self._placing < self._config.adopt_at_once:
            user = next(iter(self._waiting))
            del self._waiting[user]
            self._placing += 1
            self._resolver.place(user, self._placed)

    def _placed(self, result: Placement | UserRefused) -> None:
        self._placing -= 1
        if isinstance(result, Placement):
            node = self._nodes.get(result.incarnation)
            if node is not None and node.session is not None and not node.fencing:
                self._turn.grant(node.session, result, activate=True)
