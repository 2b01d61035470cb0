"""The other nodes, as far as the registry tells this one, and when one of them went.

Who may take users over is what a drain asks; since when a user's last node is gone is what the
gap of that user is counted from. Times are those of CLOCK_BOOTTIME, in milliseconds.
"""

from collections.abc import Iterable

from steward.model.keys import NodeId
from steward.runtime.clock import boot_ms

MOST_GONE = 10_000


class Neighbours:
    """The nodes of the registry's list. One event loop."""

    def __init__(self) -> None:
        self._members: frozenset[NodeId] = frozenset()
        self._left_ms: dict[str, int] = {}

    def now(self, node_ids: Iterable[NodeId]) -> None:
        """These are the nodes, perhaps with this one among them."""
        members, before = frozenset(node_ids), self._members
        self._members = members
        for node_id in before - members:
            self._left_ms[node_id] = boot_ms()
            if len(self._left_ms) > MOST_GONE:
                del self._left_ms[next(iter(self._left_ms))]

    def others(self, own: NodeId | None) -> bool:
        """Whether there is any node but this one."""
        return any(node_id != own for node_id in self._members)

    def gone_ms(self, node_id: str) -> int:
        """For how long a node has been gone; 0 when that isn't known here."""
        left_ms = self._left_ms.get(node_id)
        return boot_ms() - left_ms if left_ms is not None else 0
