"""Where a user's manager lives."""

from dataclasses import dataclass

from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, UserKey


@dataclass(frozen=True, slots=True)
class Placement:
    """ "User U is on node N under epoch E", as the registry granted it.

    `address` is `host:port` of the node's gRPC server.
    """

    user: UserKey
    epoch: Epoch
    node_id: NodeId
    node_rev: NodeRev
    address: str

    @property
    def incarnation(self) -> NodeIncarnation:
        return NodeIncarnation(self.node_id, self.node_rev)
