"""Do placements, nodes and managers of one moment fit together? The check, apart from who looks.

`findings` compares what the registry has stored, which node incarnations live, and which
managers are live, and reports every disagreement. It is pure and judges one picture: a
picture that was put together while users moved may show what never was at one time, so
look twice before calling it a breach.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from steward.model.keys import Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement


class Disagreement(StrEnum):
    """What can be wrong."""

    TWO_PLACEMENTS = "two_placements"
    DEAD_NODE = "dead_node"
    NO_PLACEMENT = "no_placement"
    TWO_MANAGERS = "two_managers"
    OTHER_HOLDER = "other_holder"


@dataclass(frozen=True, slots=True)
class LiveManager:
    """A manager that some node says it has."""

    user: UserKey
    epoch: Epoch
    incarnation: NodeIncarnation


@dataclass(frozen=True, slots=True)
class OwnershipFinding:
    """One disagreement about one user, with what was seen."""

    kind: Disagreement
    user: UserKey
    evidence: str


def findings(
    placements: Iterable[Placement],
    alive: Iterable[NodeIncarnation],
    managers: Iterable[LiveManager],
) -> list[OwnershipFinding]:
    """Every disagreement, by user. Empty: each user has one holder, and it lives."""
    living = frozenset(alive)
    placed: defaultdict[UserKey, list[Placement]] = defaultdict(list)
    for placement in placements:
        placed[placement.user].append(placement)
    live: defaultdict[UserKey, list[LiveManager]] = defaultdict(list)
    for manager in managers:
        live[manager.user].append(manager)
    found: list[OwnershipFinding] = []
    for user in sorted({*placed, *live}):
        found += _of_user(user, placed[user], live[user], living)
    return found


def _of_user(
    user: UserKey,
    placements: list[Placement],
    managers: list[LiveManager],
    living: frozenset[NodeIncarnation],
) -> list[OwnershipFinding]:
    found = []
    if len(placements) > 1:
        where = ", ".join(f"{p.node_id}/{p.node_rev} under {p.epoch}" for p in placements)
        found.append(OwnershipFinding(Disagreement.TWO_PLACEMENTS, user, where))
    if len(managers) > 1:
        where = ", ".join(f"{m.incarnation.node_id} under {m.epoch}" for m in managers)
        found.append(OwnershipFinding(Disagreement.TWO_MANAGERS, user, where))
    for placement in placements:
        if placement.incarnation not in living:
            where = f"{placement.node_id}/{placement.node_rev} does not live"
            found.append(OwnershipFinding(Disagreement.DEAD_NODE, user, where))
    granted = {(p.incarnation, p.epoch) for p in placements}
    for manager in managers:
        where = f"{manager.incarnation.node_id}/{manager.incarnation.node_rev}"
        if not placements:
            found.append(OwnershipFinding(Disagreement.NO_PLACEMENT, user, f"a manager on {where}"))
        elif (manager.incarnation, manager.epoch) not in granted:
            evidence = f"a manager on {where} under {manager.epoch}, which was not granted"
            found.append(OwnershipFinding(Disagreement.OTHER_HOLDER, user, evidence))
    return found
