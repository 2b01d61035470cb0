"""Everything that the registry wants done, as values.

The driver performs them in order. `handle` puts transactions first, then grants, then
answers; an answer that depends on a write is only made after that write's outcome came
back, so no effect has to wait for another of the same list.
"""

from dataclasses import dataclass
from typing import NamedTuple

from registry_service.core.commands import DialId, PeerId, TransactionId
from registry_service.core.transactions import Evidence, NodeRecord, StoreOperation
from steward.errors import Reason
from steward.model.keys import (
    EdgeId,
    Epoch,
    NodeId,
    NodeIncarnation,
    NodeRev,
    Revision,
    UserKey,
)
from steward.model.placement import Placement
from steward.model.violations import Violation

# Messages to a peer


@dataclass(frozen=True, slots=True)
class NodeWelcome:
    node_rev: NodeRev
    ttl_ms: int
    beat_ms: int
    registry_id: str
    strict_tenants: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RegistryBeat:
    beat: int


@dataclass(frozen=True, slots=True)
class LeaseRenewed:
    renewal: int
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class PlacementsGranted:
    """With `activate` the node makes their managers at once, without waiting for an edge."""

    placements: tuple[Placement, ...]
    activate: bool = False


@dataclass(frozen=True, slots=True)
class PlacementsConfirmed:
    request_id: int
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class PlacementsReleased:
    request_id: int
    deleted: int


@dataclass(frozen=True, slots=True)
class NodeFenced:
    """To the node itself: stop. To an edge: ask anew for the users of this incarnation."""

    incarnation: NodeIncarnation
    cause: str


class OwnedUser(NamedTuple):
    user: UserKey
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class HandOffUsers:
    """To their node: let go of these users by plan. `cause` is drain or move."""

    users: tuple[OwnedUser, ...]
    cause: str


@dataclass(frozen=True, slots=True)
class EvictManagers:
    """To their node: end these managers for good."""

    users: tuple[OwnedUser, ...]


@dataclass(frozen=True, slots=True)
class ClusterMembers:
    """To nodes: who is in the cluster and takes users: living and not draining."""

    node_ids: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class AskLogHead:
    """To one node: what is the largest fence in the log?"""


@dataclass(frozen=True, slots=True)
class EdgeWelcome:
    registry_id: str


@dataclass(frozen=True, slots=True)
class UserRefused:
    user: UserKey
    reason: Reason
    message: str
    retry_after_ms: int


@dataclass(frozen=True, slots=True)
class ManagersResolved:
    """In the order of the request. `cached` of the placements needed no store.

    An answer to a part of a request names the places of its users (`indexes`); `more` will follow.
    """

    request_id: int
    results: tuple[Placement | UserRefused, ...]
    cached: int
    indexes: tuple[int, ...] = ()
    more: bool = False


@dataclass(frozen=True, slots=True)
class PlacementFound:
    """`edges` are those that asked for this user since it was placed."""

    placement: Placement | None
    alive: bool
    edges: tuple[EdgeId, ...] = ()


@dataclass(frozen=True, slots=True)
class PlacementMoved:
    """To the edges that asked for this user: it was moved by plan."""

    placement: Placement


@dataclass(frozen=True, slots=True)
class EvictSessions:
    """To every edge: end the sessions of this user (`UserEvicted` on the wire)."""

    user: UserKey
    cause: str


@dataclass(frozen=True, slots=True)
class AskConnections:
    """To every edge: how many are open of these users? Of an operator, not of the machine."""

    question: int
    users: tuple[UserKey, ...]


@dataclass(frozen=True, slots=True)
class NodeStatus:
    record: NodeRecord
    draining: bool
    managers: int


@dataclass(frozen=True, slots=True)
class ClusterNodes:
    """To edges: the nodes that live, draining ones too."""

    nodes: tuple[NodeStatus, ...]


@dataclass(frozen=True, slots=True)
class ClusterDescribed:
    nodes: tuple[NodeStatus, ...]
    revision: Revision
    placements: int
    edges: int


@dataclass(frozen=True, slots=True)
class DeathRecorded:
    fenced: bool


@dataclass(frozen=True, slots=True)
class NodeDrained:
    """The drain is durable; so many users have to move."""

    node_rev: NodeRev
    placements: int


@dataclass(frozen=True, slots=True)
class NodeFencedByOperator:
    node_rev: NodeRev


@dataclass(frozen=True, slots=True)
class UserMoved:
    placement: Placement
    from_node: NodeId


@dataclass(frozen=True, slots=True)
class UserEvicted:
    """The placement under this epoch is over."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Refused:
    """Ends the stream or call with a row of the error table."""

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class AskHoldings:
    """To a node or an edge: what is held? Of these buckets by name; without any, the digest.

    Of the census, not of the machine.
    """

    question: int
    buckets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AskFences:
    """To a node: what are the log's fences of these users, or a page of all? Of the census too."""

    question: int
    users: tuple[UserKey, ...] = ()
    after: UserKey | None = None


Message = (
    NodeWelcome
    | RegistryBeat
    | LeaseRenewed
    | PlacementsGranted
    | PlacementsConfirmed
    | PlacementsReleased
    | NodeFenced
    | HandOffUsers
    | EvictManagers
    | ClusterMembers
    | AskLogHead
    | EdgeWelcome
    | ManagersResolved
    | PlacementFound
    | PlacementMoved
    | EvictSessions
    | AskConnections
    | AskHoldings
    | AskFences
    | ClusterNodes
    | ClusterDescribed
    | DeathRecorded
    | NodeDrained
    | NodeFencedByOperator
    | UserMoved
    | UserEvicted
    | Refused
)


# Effects


@dataclass(frozen=True, slots=True)
class Commit:
    """Start this store transaction; its outcome comes back as `FinishTransaction`."""

    transaction: TransactionId
    operations: tuple[StoreOperation, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Give a message to a peer. A peer that is gone meanwhile needs nothing."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Close:
    """End a peer's stream, after what was sent on it."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Dial:
    """Try to connect to a node's address; the outcome comes back as `FinishDial`."""

    dial: DialId
    address: str


@dataclass(frozen=True, slots=True)
class Halt:
    """This process must end: another one owns the store."""

    cause: str


# Notices: nothing to do but count and log


@dataclass(frozen=True, slots=True)
class NodeUp:
    incarnation: NodeIncarnation
    address: str
    resumed: bool


@dataclass(frozen=True, slots=True)
class NodeDraining:
    incarnation: NodeIncarnation


@dataclass(frozen=True, slots=True)
class NodeLost:
    incarnation: NodeIncarnation
    cause: str
    evidence: Evidence
    detail: str


@dataclass(frozen=True, slots=True)
class ViolationSeen:
    """A refusal or breach that the machine had recorded; it is durable under this number."""

    number: int
    violation: Violation
    reporter: str


@dataclass(frozen=True, slots=True)
class PlacementEnded:
    """A planned move or eviction of one user came to its end after so long."""

    user: UserKey
    cause: str
    took_ms: int


@dataclass(frozen=True, slots=True)
class GenerationRaised:
    generation: int
    cause: str


@dataclass(frozen=True, slots=True)
class GraceBegun:
    """Until `until_ms` only proof and refused dials fence a node."""

    cause: str
    until_ms: int


Notice = (
    NodeUp
    | NodeDraining
    | NodeLost
    | ViolationSeen
    | PlacementEnded
    | GenerationRaised
    | GraceBegun
)
Effect = Commit | Send | Close | Dial | Halt | Notice
