"""Connections and last sequences as an operator sees them, for `where` and `status`.

Both are asked for, not remembered: the edges say how many sockets are open, a node what the
last stored event of a user is. Who does not answer is shown as unknown, never as 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steward.errors import StewardError
from steward.model.keys import UserKey

if TYPE_CHECKING:
    from steward.cli.operator_calls import Operator
    from steward.v1.registry_service_pb2 import CountConnectionsResponse


@dataclass(frozen=True, slots=True)
class Counts:
    """Connections by edge id; None of an edge that did not answer."""

    by_edge: dict[str, int | None]

    @property
    def total(self) -> int | None:
        """Of all edges; None when one of them did not answer."""
        known = [count for count in self.by_edge.values() if count is not None]
        return sum(known) if len(known) == len(self.by_edge) else None

    def __str__(self) -> str:
        held = [
            f"{'unknown' if count is None else count} at {edge}"
            for edge, count in self.by_edge.items()
            if count != 0
        ]
        if not held:
            return "no connections"
        known = sum(count for count in self.by_edge.values() if count is not None)
        least = "" if self.total is not None else "at least "
        return f"{least}{known} connection{'' if known == 1 else 's'}: {', '.join(held)}"


def all_of(response: "CountConnectionsResponse") -> Counts:
    """Every connection, whoever's it is."""
    return Counts({edge.edge_id: edge.open if edge.answered else None for edge in response.edges})


def of_user(response: "CountConnectionsResponse", index: int) -> Counts:
    """Those of the user who had this index in the question."""
    return Counts(
        {edge.edge_id: edge.of_users[index] if edge.answered else None for edge in response.edges}
    )


async def last_sequence(operator: "Operator", nodes: Iterable[str], user: UserKey) -> int | None:
    """The last stored sequence, by the first of these nodes that answers; None when none does."""
    for node in nodes:
        try:
            return await operator.last_sequence(node, user)
        except StewardError:
            continue
    return None
