"""Who is told which nodes there are: every edge and every node, after its welcome and at changes.

Edges get all living nodes, with their addresses and whether they drain; nodes get the names of
those that take users, to share work among themselves. One message per turn and peer, however
much happened in it.
"""

from registry_service.core.commands import PeerId
from registry_service.core.effects import ClusterMembers, ClusterNodes
from registry_service.core.node import Node, NodeTable
from registry_service.core.turn import Turn


class Cluster:
    """Tells the list of nodes."""

    def __init__(self, turn: Turn, nodes: NodeTable) -> None:
        self._turn = turn
        self._nodes = nodes

    def announce(self, welcomed: list[Node], new_edge: PeerId | None) -> None:
        """At the end of a turn: tell the newcomers, or all if something changed."""
        turn = self._turn
        if not (turn.cluster_changed or welcomed or new_edge is not None):
            return
        living = [node for node in self._nodes if not node.fencing]
        nodes = ClusterNodes(tuple(node.status() for node in living))
        members = ClusterMembers(tuple(node.node_id for node in living if not node.draining))
        if turn.cluster_changed:
            turn.cluster_changed = False
            turn.tell_edges(nodes)
            welcomed = living
        elif new_edge is not None:
            turn.send(new_edge, nodes)
        for node in welcomed:
            if node.session is not None:
                turn.send(node.session, members)
