"""What the machine asks of the placement store, and what the store answers.

An operation is atomic and compares before it writes, so that it is safe whoever else
writes; all are idempotent in the sense of P7: sent again after an unknown result they
do no harm and answer with what is there. A batch of operations is one transaction
where the engine has such; the machine does not rely on it.
"""

from dataclasses import dataclass
from enum import StrEnum

from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, Revision, UserKey
from steward.model.placement import Placement

NO_EPOCH = Epoch(0)


class Evidence(StrEnum):
    """Why a node is held to be dead; the letters are those of the ownership protocol (P13)."""

    PROOF = "A"
    BROKEN_AND_REFUSED = "B"
    MISSED_BEATS = "C"
    LEASE_OVER = "D"
    OPERATOR = "E"


@dataclass(frozen=True, slots=True)
class NodeClaim:
    """What a process says of itself when it joins. `nonce` is random, once per process."""

    node_id: NodeId
    boot_id: str
    nonce: str
    address: str
    zone: str = ""
    capacity: int = 0
    version: str = ""
    pid: int = 0


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One living incarnation as it is in the store."""

    claim: NodeClaim
    node_rev: NodeRev
    draining: bool = False

    @property
    def incarnation(self) -> NodeIncarnation:
        return NodeIncarnation(self.claim.node_id, self.node_rev)


@dataclass(frozen=True, slots=True)
class StoreView:
    """What a starting registry finds: the living nodes and how many users each has."""

    generation: int
    revision: Revision
    nodes: tuple[NodeRecord, ...] = ()
    placements: tuple[tuple[NodeIncarnation, int], ...] = ()


# Operations


@dataclass(frozen=True, slots=True)
class JoinNode:
    """Create the node if no incarnation of that name lives and the nonce was never fenced."""

    claim: NodeClaim


@dataclass(frozen=True, slots=True)
class FenceNode:
    """End an incarnation, if it still is the living one: one write for any number of users."""

    incarnation: NodeIncarnation
    cause: str
    evidence: Evidence
    detail: str = ""


@dataclass(frozen=True, slots=True)
class DrainNode:
    """Place nobody on this incarnation any more."""

    incarnation: NodeIncarnation
    cause: str


@dataclass(frozen=True, slots=True)
class PlaceUser:
    """Keep the user's placement if its incarnation lives; else put the user on `target`.

    `target` must be alive and not draining, or the user stays where it is not.
    """

    user: UserKey
    target: NodeIncarnation
    cause: str


@dataclass(frozen=True, slots=True)
class ReleasePlacement:
    """Delete the placement if it still has this epoch and this holder."""

    user: UserKey
    epoch: Epoch
    holder: NodeIncarnation
    cause: str


@dataclass(frozen=True, slots=True)
class ReadPlacement:
    """Read the user's placement, linearizably; places nobody."""

    user: UserKey


@dataclass(frozen=True, slots=True)
class RecordRefusal:
    """Keep a refusal in the ledger. Sent again after an unknown result it may be there twice."""

    kind: str
    detail: str
    user: UserKey | None = None
    epoch: Epoch = NO_EPOCH
    node: NodeIncarnation | None = None
    traceparent: str = ""


StoreOperation = (
    JoinNode | FenceNode | DrainNode | PlaceUser | ReleasePlacement | ReadPlacement | RecordRefusal
)


# Results, one per operation


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """The node is there, with this nonce: made now, or by an earlier attempt."""

    record: NodeRecord


@dataclass(frozen=True, slots=True)
class NodeOccupied:
    """Another process holds the name."""

    record: NodeRecord


@dataclass(frozen=True, slots=True)
class NonceSpent:
    """This process was fenced before: a fenced process never becomes a node again."""

    incarnation: NodeIncarnation
    cause: str


@dataclass(frozen=True, slots=True)
class UserPlaced:
    """Where the user is now. `created` says that this operation put it there."""

    placement: Placement
    created: bool


@dataclass(frozen=True, slots=True)
class TargetRefused:
    """The chosen node can't take users: it is draining, or (else) gone."""

    draining: bool


@dataclass(frozen=True, slots=True)
class PlacementReleased:
    """Whether the placement was deleted, and what is there now."""

    deleted: bool
    current: Placement | None


@dataclass(frozen=True, slots=True)
class PlacementRead:
    """The placement as stored, and whether its incarnation lives."""

    placement: Placement | None
    alive: bool


@dataclass(frozen=True, slots=True)
class Done:
    """A fence, drain or record is in the store; `changed` is false when it was there already."""

    changed: bool


StoreResult = (
    NodeJoined
    | NodeOccupied
    | NonceSpent
    | UserPlaced
    | TargetRefused
    | PlacementReleased
    | PlacementRead
    | Done
)


# Outcomes of a batch


@dataclass(frozen=True, slots=True)
class Committed:
    """Durable. Results are in the order of the operations; `revision` is the store's now."""

    results: tuple[StoreResult, ...]
    revision: Revision


@dataclass(frozen=True, slots=True)
class TermLost:
    """Refused: another registry process raised the term, so this one must end."""

    term: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """No answer in time: it may be committed or not."""


Outcome = Committed | TermLost | Unknown
