"""What a violation can be: the one table of kinds, with its severity and what it means.

A *refusal* is a guard that worked; a *breach* is an invariant that was seen broken, and
must never be. Whoever sees one reports it to the registry, which keeps it with its evidence.
"""

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from steward.model.keys import Epoch, NodeIncarnation, UserKey

NO_EPOCH = Epoch(0)


class Severity(StrEnum):
    REFUSAL = "refusal"
    BREACH = "breach"


class ViolationKind(StrEnum):
    """Names are stable: they are labels of metrics and keys of alerts."""

    # Refusals of the log, seen by the node that wrote.
    STALE_APPEND = "stale_append"
    STALE_SEAL = "stale_seal"
    APPEND_CONFLICT = "append_conflict"
    # Refusals of a node.
    STALE_EPOCH_COMMAND = "stale_epoch_command"
    UNKNOWN_PLACEMENT = "unknown_placement"
    FORGED_EPOCH = "forged_epoch"
    STALE_EPOCH = "stale_epoch"
    SECOND_MANAGER = "second_manager"
    DIRECT_CONSTRUCTION = "direct_construction"
    NODE_STOOD_STILL = "node_stood_still"
    # Refusals of the registry.
    NODE_ID_IN_USE = "node_id_in_use"
    FENCED_NODE_RETURNED = "fenced_node_returned"
    FOREIGN_RELEASE = "foreign_release"
    WRONG_CLUSTER = "wrong_cluster"
    # Refusals of an edge.
    STALE_DELIVERY = "stale_delivery"
    DELIVERY_GAP = "delivery_gap"
    FOREIGN_DELIVERY = "foreign_delivery"
    FOREIGN_USER = "foreign_user"
    FOREIGN_ORIGIN = "foreign_origin"
    REPLAYED_TICKET = "replayed_ticket"
    # Breaches.
    FENCE_ABOVE_REGISTRY = "fence_above_registry"
    TWO_EFFECTIVE_MANAGERS = "two_effective_managers"
    EPOCH_WENT_DOWN = "epoch_went_down"
    STREAM_WENT_BACK = "stream_went_back"
    FOREIGN_EVENT = "foreign_event"
    # Breaches that a census found: each lasted, and is no move on its way.
    DUPLICATE_MANAGER = "duplicate_manager"
    STALE_MANAGER = "stale_manager"
    ORPHAN_MANAGER = "orphan_manager"
    UNSEALED_MANAGER = "unsealed_manager"
    UNREACHABLE_USER = "unreachable_user"
    MISATTACHED_EDGE = "misattached_edge"


@dataclass(frozen=True, slots=True)
class KindRow:
    severity: Severity
    meaning: str


_REFUSAL, _BREACH = Severity.REFUSAL, Severity.BREACH
KINDS = MappingProxyType(
    {
        ViolationKind.STALE_APPEND: KindRow(
            _REFUSAL, "a manager whose user was taken over tried to write"
        ),
        ViolationKind.STALE_SEAL: KindRow(
            _REFUSAL, "a node tried to begin a manager under an epoch that is over"
        ),
        ViolationKind.APPEND_CONFLICT: KindRow(
            _REFUSAL, "a manager tried to write at a sequence that is not the next one"
        ),
        ViolationKind.STALE_EPOCH_COMMAND: KindRow(
            _REFUSAL, "an edge sent a command under an epoch that is over"
        ),
        ViolationKind.UNKNOWN_PLACEMENT: KindRow(
            _REFUSAL, "an attach for a user who is not placed on this node"
        ),
        ViolationKind.FORGED_EPOCH: KindRow(
            _REFUSAL, "an attach under an epoch that the registry never granted"
        ),
        ViolationKind.STALE_EPOCH: KindRow(_REFUSAL, "an attach under an epoch that is over"),
        ViolationKind.SECOND_MANAGER: KindRow(
            _REFUSAL, "a second manager was asked for under one epoch"
        ),
        ViolationKind.DIRECT_CONSTRUCTION: KindRow(
            _REFUSAL, "a manager was constructed past its host"
        ),
        ViolationKind.NODE_STOOD_STILL: KindRow(
            _REFUSAL, "a node found that it had been stopped for longer than its lease, and ended"
        ),
        ViolationKind.NODE_ID_IN_USE: KindRow(
            _REFUSAL, "a process asked for the name of a node that lives"
        ),
        ViolationKind.FENCED_NODE_RETURNED: KindRow(
            _REFUSAL, "a process that was fenced asked to be a node again"
        ),
        ViolationKind.FOREIGN_RELEASE: KindRow(
            _REFUSAL, "a release of a placement that is another node's, or newer"
        ),
        ViolationKind.WRONG_CLUSTER: KindRow(_REFUSAL, "a process of another cluster came"),
        ViolationKind.STALE_DELIVERY: KindRow(
            _REFUSAL, "a node delivered under an epoch that is over; nothing was shown"
        ),
        ViolationKind.DELIVERY_GAP: KindRow(
            _REFUSAL, "a node delivered past the next event; the log filled the gap"
        ),
        ViolationKind.FOREIGN_DELIVERY: KindRow(
            _REFUSAL, "a node delivered for a user who is not attached to it; nothing was shown"
        ),
        ViolationKind.FOREIGN_USER: KindRow(_REFUSAL, "a client named a user in a message"),
        ViolationKind.FOREIGN_ORIGIN: KindRow(
            _REFUSAL, "a page of a foreign origin tried to connect"
        ),
        ViolationKind.REPLAYED_TICKET: KindRow(_REFUSAL, "a ticket came a second time"),
        ViolationKind.FENCE_ABOVE_REGISTRY: KindRow(
            _BREACH, "the log has a higher fence than the registry ever granted: it lost its past"
        ),
        ViolationKind.TWO_EFFECTIVE_MANAGERS: KindRow(
            _BREACH, "two managers of one user could write at the same time"
        ),
        ViolationKind.EPOCH_WENT_DOWN: KindRow(_BREACH, "an epoch of a user went down"),
        ViolationKind.STREAM_WENT_BACK: KindRow(
            _BREACH, "a stream ends before an event that was shown: the log lost its past"
        ),
        ViolationKind.FOREIGN_EVENT: KindRow(_BREACH, "a client was shown another user's event"),
        ViolationKind.DUPLICATE_MANAGER: KindRow(
            _BREACH, "two live managers of one user, of which at most one can write"
        ),
        ViolationKind.STALE_MANAGER: KindRow(
            _BREACH, "a live manager under an epoch that is over, and it stays"
        ),
        ViolationKind.ORPHAN_MANAGER: KindRow(
            _BREACH, "a live manager of a placement that the registry does not have"
        ),
        ViolationKind.UNSEALED_MANAGER: KindRow(
            _BREACH, "a live manager under an epoch that the log never sealed, or has forgotten"
        ),
        ViolationKind.UNREACHABLE_USER: KindRow(
            _BREACH, "a user is placed on a node that has no manager and can't make one"
        ),
        ViolationKind.MISATTACHED_EDGE: KindRow(
            _BREACH, "an edge stays attached to another manager than the registry's"
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Violation:
    """One report. `user`, `node` are None, `epoch` 0, texts empty where they don't apply."""

    kind: ViolationKind
    evidence: str
    user: UserKey | None = None
    epoch: Epoch = NO_EPOCH
    node: NodeIncarnation | None = None
    traceparent: str = ""
    count: int = 1

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind].severity
