"""The end of an incarnation: one write, whatever it was worth, and who is told (P12).

Guarantees: edges, the node and whoever waits are told only after the fence is in the store;
a node that is being fenced counts as dead at once and takes nobody. It does not guarantee
that a fenced process has stopped: the log does that, and for strict tenants `Holds`.
"""

from collections.abc import Callable

from registry_service.core.commands import FenceNodeByOperator
from registry_service.core.effects import (
    Close,
    NodeFenced,
    NodeFencedByOperator,
    NodeLost,
    Refused,
)
from registry_service.core.holds import Holds
from registry_service.core.node import Node, NodeTable
from registry_service.core.pipeline import StorePipeline
from registry_service.core.transactions import Evidence, FenceNode, fence_of_raise
from registry_service.core.turn import Turn
from steward.errors import Reason
from steward.model.keys import GENERATION_SHIFT, NodeIncarnation


class Fencing:
    """Fences nodes. `listeners` hear of each one after it is durable and out of the table."""

    def __init__(self, turn: Turn, store: StorePipeline, nodes: NodeTable, holds: Holds) -> None:
        self._turn = turn
        self._store = store
        self._nodes = nodes
        self._holds = holds
        self.listeners: list[Callable[[Node], None]] = []

    def fence(self, node: Node, cause: str, evidence: Evidence, detail: str) -> None:
        """Begin; nothing happens if it has begun already."""
        if node.fencing:
            return
        node.fencing = True
        node.redial_at_ms = None
        fence = FenceNode(node.incarnation, cause, evidence, detail, self._holds.needed(evidence))
        self._store.submit(fence, lambda _: self._fenced(node, fence), first=True)

    def gone(self, incarnation: NodeIncarnation) -> None:
        """The store says that this incarnation is not there: evidence D at once."""
        node = self._nodes.get(incarnation)
        if node is not None:
            self.fence(node, "gone from the store", Evidence.LEASE_OVER, "")

    def raised(self, generation: int) -> None:
        """The generation was raised, and whoever had joined before was fenced in that step."""
        for node in list(self._nodes):
            if node.incarnation.node_rev >> GENERATION_SHIFT < generation:
                node.fencing = True
                self._fenced(node, fence_of_raise(node.incarnation))

    def by_operator(self, command: FenceNodeByOperator) -> None:
        """Evidence E."""
        node = self._nodes.named(command.node_id)
        if node is None:
            unknown = f"there is no node {command.node_id!r}; see `steward status`"
            self._turn.send(command.peer, Refused(Reason.NOT_FOUND, unknown))
            return
        node.awaiting.append((command.peer, NodeFencedByOperator(node.incarnation.node_rev)))
        self.fence(node, command.cause or "operator", Evidence.OPERATOR, "asked for")

    def _fenced(self, node: Node, fence: FenceNode) -> None:
        if self._nodes.get(node.incarnation) is not node:
            return  # The generation was raised while this fence was on its way.
        turn = self._turn
        self._nodes.remove(node)
        if fence.hold:
            self._holds.begin(node.incarnation, node.record.claim.pid, node.lease_until_ms)
        if fence.hold and node.proven:
            # Suspicion was faster than the proof, which came while the fence was on its way.
            self._holds.prove(node.node_id, node.record.claim.pid)
        message = NodeFenced(node.incarnation, fence.cause)
        if node.session is not None:
            turn.send(node.session, message)
            turn.emit(Close(node.session))
            self._nodes.sessions.pop(node.session, None)
        turn.tell_edges(message)
        for peer, answer in node.awaiting:
            turn.send(peer, answer)
        turn.emit(NodeLost(node.incarnation, fence.cause, fence.evidence, fence.detail))
        turn.more_room = True
        for listener in self.listeners:
            listener(node)
