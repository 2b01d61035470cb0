"""What the machine asks of the placement store, and what the store answers.

An operation is atomic and compares before it writes, so that it is safe whoever else
writes; all are idempotent in the sense of P7: sent again after an unknown result they
do no harm and answer with what is there. A batch of operations is one transaction
where the engine has such; the machine does not rely on it.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, Revision, UserKey
from steward.model.placement import Placement
from steward.model.violations import Violation

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
class Hold:
    """A fenced incarnation that may still be executing: its strict users may not be taken over."""

    incarnation: NodeIncarnation
    pid: int


@dataclass(frozen=True, slots=True)
class StoreView:
    """What a starting registry finds: living nodes, how many users each has, and the holds.

    `raised` says why the generation was raised when the store was opened; empty if it was not.
    `most_operations` is how many one transaction of this engine may have.
    """

    generation: int
    revision: Revision
    nodes: tuple[NodeRecord, ...] = ()
    placements: tuple[tuple[NodeIncarnation, int], ...] = ()
    holds: tuple[Hold, ...] = ()
    raised: str = ""
    most_operations: int = field(default=100, compare=False)


# Operations


@dataclass(frozen=True, slots=True)
class JoinNode:
    """Create the node if no incarnation of that name lives and the nonce was never fenced."""

    claim: NodeClaim


@dataclass(frozen=True, slots=True)
class FenceNode:
    """End an incarnation, if it still is the living one: one write for any number of users.

    With `hold`, its users of strict tenants stay where they are until `LiftHold`.
    """

    incarnation: NodeIncarnation
    cause: str
    evidence: Evidence
    detail: str = ""
    hold: bool = False


@dataclass(frozen=True, slots=True)
class LiftHold:
    """The fenced incarnation has stopped executing for sure."""

    incarnation: NodeIncarnation


@dataclass(frozen=True, slots=True)
class MarkDraining:
    """Place nobody on this incarnation any more."""

    incarnation: NodeIncarnation
    cause: str


@dataclass(frozen=True, slots=True)
class PlaceUser:
    """Keep the user's placement if its incarnation lives; else put the user on `target`.

    `target` must be alive and not draining, or the user stays where it is not. A `strict` user
    stays on a dead incarnation too, while that one has a hold.
    """

    user: UserKey
    target: NodeIncarnation
    cause: str
    strict: bool = False
    # Of who asked; kept in the ledger.
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class TakeOver:
    """Move a user by plan, if the placement still has this epoch and this holder.

    On `target` under a new epoch if that node is alive and not draining; else (or without a
    target) the placement is deleted, and the next resolve places the user.
    """

    user: UserKey
    epoch: Epoch
    holder: NodeIncarnation
    target: NodeIncarnation | None
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
class ListPlacements:
    """A page of the placements of one incarnation, by user, after the user `after`."""

    incarnation: NodeIncarnation
    after: UserKey | None
    limit: int


@dataclass(frozen=True, slots=True)
class RaiseGeneration:
    """Every later epoch has at least this generation: above all that a lost past granted.

    Whoever is a node is fenced in the same step, as by `fence_of_raise`: what it believes to hold
    is of that past. All come again as new incarnations.
    """

    at_least: int
    cause: str


def fence_of_raise(incarnation: NodeIncarnation) -> FenceNode:
    """What `RaiseGeneration` does to a node: nobody saw it die, so its strict users are held."""
    detail = "every node joins anew"
    return FenceNode(incarnation, "generation raised", Evidence.LEASE_OVER, detail, hold=True)


@dataclass(frozen=True, slots=True)
class RecordViolation:
    """Keep a violation. Sent again after an unknown result it may be there twice.

    `reporter` is `role:id` of who saw it.
    """

    violation: Violation
    reporter: str


StoreOperation = (
    JoinNode
    | FenceNode
    | LiftHold
    | MarkDraining
    | PlaceUser
    | TakeOver
    | ReleasePlacement
    | ReadPlacement
    | ListPlacements
    | RaiseGeneration
    | RecordViolation
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
class UserHeld:
    """A strict user whose node is fenced and may still be executing: nothing was changed."""

    placement: Placement


@dataclass(frozen=True, slots=True)
class UserTakenOver:
    """The user was moved. A take-over that moved nobody answers `PlacementReleased`."""

    placement: Placement


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
class PlacementPage:
    """`more` says that there are placements after the last of these."""

    placements: tuple[Placement, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class GenerationIs:
    """The generation of the next epoch."""

    generation: int
    raised: bool


@dataclass(frozen=True, slots=True)
class Done:
    """A fence, drain or lift is in the store; `changed` is false when it was there already."""

    changed: bool


@dataclass(frozen=True, slots=True)
class ViolationRecorded:
    """It is kept under this number."""

    number: int


StoreResult = (
    NodeJoined
    | NodeOccupied
    | NonceSpent
    | UserPlaced
    | UserHeld
    | UserTakenOver
    | TargetRefused
    | PlacementReleased
    | PlacementRead
    | PlacementPage
    | GenerationIs
    | Done
    | ViolationRecorded
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
