"""Which node a new user should live on: rendezvous hashing with bounded loads.

Every (user, node) pair has a score that depends on nothing else; the user goes to the
highest score among the nodes that carry less than 1.25 times the mean. So users spread
evenly, and a node that comes or goes moves only its own share. The choice is a
suggestion: it is never unsafe, whatever it is. The hash is BLAKE2b and the same in
every process, unlike Python's `hash`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from steward.model.keys import NodeId, UserKey

_LOAD_NUMERATOR = 5
_LOAD_DENOMINATOR = 4


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that could take a user. `load` counts users; `capacity` 0 means no limit."""

    node_id: NodeId
    load: int
    capacity: int = 0


def score(user: UserKey, node_id: NodeId) -> int:
    """The weight of a pair, 64 bits. Lengths are part of the input: no two pairs read the same."""
    tenant, name = user
    pair = f"{len(node_id)}:{node_id}{len(tenant)}:{tenant}{name}"
    return int.from_bytes(blake2b(pair.encode(), digest_size=8).digest(), "big")


def choose(user: UserKey, candidates: Iterable[Candidate]) -> NodeId | None:
    """The node for this user, or None when every candidate is full.

    The bound is ceil(1.25 x (all users + this one) / nodes), so there is always a node below it.
    """
    able = [c for c in candidates if c.capacity == 0 or c.load < c.capacity]
    if not able:
        return None
    total = sum(c.load for c in able) + 1
    bound = -(-total * _LOAD_NUMERATOR // (_LOAD_DENOMINATOR * len(able)))
    below = [c for c in able if c.load < bound]
    return max(below, key=lambda c: (score(user, c.node_id), c.node_id)).node_id
