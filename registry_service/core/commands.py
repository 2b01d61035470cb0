"""Everything that can happen to the registry, as values.

A `PeerId` names one open stream or one waiting call; the driver numbers them and never
uses a number twice. Users, epochs and node names are validated before they come here.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

from registry_service.core.transactions import NO_EPOCH, NodeClaim, Outcome, StoreView
from steward.model.keys import EdgeId, Epoch, NodeId, NodeIncarnation, UserKey

PeerId = NewType("PeerId", int)
DialId = NewType("DialId", int)
TransactionId = NewType("TransactionId", int)


class StreamEnd(StrEnum):
    """How a stream ended: both are the same evidence; the ledger keeps which."""

    RESET = "reset"
    EOF = "eof"


class DialOutcome(StrEnum):
    """Only a refusal says something: a paused process still accepts, its kernel does it."""

    REFUSED = "refused"
    ACCEPTED = "accepted"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True)
class Recover:
    """The first command: what the store holds. A grace of one TTL begins."""

    view: StoreView


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline that `next_deadline` gave has come."""


@dataclass(frozen=True, slots=True)
class OpenNodeSession:
    """A node's hello: joins, or resumes the incarnation with the same nonce."""

    peer: PeerId
    claim: NodeClaim


@dataclass(frozen=True, slots=True)
class ReceiveBeat:
    peer: PeerId
    loop_lag_ms: int = 0
    managers: int = 0
    open_runs: int = 0
    log_reachable: bool = True


@dataclass(frozen=True, slots=True)
class RenewLease:
    peer: PeerId
    renewal: int


@dataclass(frozen=True, slots=True)
class CloseNodeSession:
    peer: PeerId
    end: StreamEnd


@dataclass(frozen=True, slots=True)
class AnnounceDrain:
    peer: PeerId


@dataclass(frozen=True, slots=True)
class ConfirmPlacements:
    """A node asks which of these users are placed on it."""

    peer: PeerId
    request_id: int
    users: tuple[UserKey, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """One placement that its node gives up, if it still has this epoch."""

    user: UserKey
    epoch: Epoch
    cause: str
    # A planned move: the handoff is in the log; place the user on another node in the same step.
    handoff: bool = False
    # The user has open runs: the next node makes the manager at once.
    activate: bool = False


@dataclass(frozen=True, slots=True)
class ReleasePlacements:
    peer: PeerId
    request_id: int
    releases: tuple[Release, ...]


@dataclass(frozen=True, slots=True)
class ReportLogHead:
    """A node's answer to `AskLogHead`; also unasked, when it met a higher fence."""

    peer: PeerId
    largest_fence: Epoch


@dataclass(frozen=True, slots=True)
class AdoptUsers:
    """Users who have an open run and, as far as this node knows, no manager (P20)."""

    peer: PeerId
    users: tuple[UserKey, ...]


@dataclass(frozen=True, slots=True)
class OpenEdgeSession:
    peer: PeerId
    edge_id: EdgeId


@dataclass(frozen=True, slots=True)
class CloseEdgeSession:
    peer: PeerId


@dataclass(frozen=True, slots=True)
class ReportUnreachable:
    """An edge can't reach this incarnation."""

    peer: PeerId
    incarnation: NodeIncarnation
    evidence: str


@dataclass(frozen=True, slots=True)
class UserQuery:
    user: UserKey
    min_epoch: Epoch = NO_EPOCH
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class ResolveManagers:
    """Where are these users? Places those that are nowhere.

    Answered as a whole, or with `as_ready` user by user as each is known.
    """

    peer: PeerId
    request_id: int
    queries: tuple[UserQuery, ...]
    as_ready: bool = False


@dataclass(frozen=True, slots=True)
class FindPlacement:
    peer: PeerId
    user: UserKey


@dataclass(frozen=True, slots=True)
class DescribeCluster:
    peer: PeerId


@dataclass(frozen=True, slots=True)
class ReportDeath:
    """Evidence A: whoever started the process has reaped it."""

    peer: PeerId
    node_id: NodeId
    pid: int
    evidence: str


@dataclass(frozen=True, slots=True)
class DrainNode:
    """An operator: place nobody on this node any more, and move its users away."""

    peer: PeerId
    node_id: NodeId


@dataclass(frozen=True, slots=True)
class FenceNodeByOperator:
    """Evidence E: the incarnation that has this name now is over."""

    peer: PeerId
    node_id: NodeId
    cause: str


@dataclass(frozen=True, slots=True)
class MoveUser:
    """A planned move of one user; with an empty `node_id` the registry chooses the node."""

    peer: PeerId
    user: UserKey
    node_id: NodeId


@dataclass(frozen=True, slots=True)
class EvictUser:
    """End a user's sessions at every edge, and put the manager away."""

    peer: PeerId
    user: UserKey
    cause: str


@dataclass(frozen=True, slots=True)
class FinishDial:
    dial: DialId
    outcome: DialOutcome


@dataclass(frozen=True, slots=True)
class FinishTransaction:
    transaction: TransactionId
    outcome: Outcome


Command = (
    Recover
    | Tick
    | OpenNodeSession
    | ReceiveBeat
    | RenewLease
    | CloseNodeSession
    | AnnounceDrain
    | ConfirmPlacements
    | ReleasePlacements
    | ReportLogHead
    | AdoptUsers
    | OpenEdgeSession
    | CloseEdgeSession
    | ReportUnreachable
    | ResolveManagers
    | FindPlacement
    | DescribeCluster
    | ReportDeath
    | DrainNode
    | FenceNodeByOperator
    | MoveUser
    | EvictUser
    | FinishDial
    | FinishTransaction
)
