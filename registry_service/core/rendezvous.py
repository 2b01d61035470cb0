"""Which node a new user should live on: rendezvous hashing with bounded loads.

The user goes to the highest score among the nodes that carry less than 1.25 times the mean. So
users spread evenly, and a node that comes or goes moves only its own share. The choice is a
suggestion: it is never unsafe, whatever it is.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar

from steward.model.keys import NodeId, UserKey
from steward.model.rendezvous import join_halves, user_half

_LOAD_NUMERATOR = 5
_LOAD_DENOMINATOR = 4


class Candidate(Protocol):
    """A node that could take a user. `load` counts users; `most` is how many it may have."""

    @property
    def node_id(self) -> NodeId: ...

    @property
    def half(self) -> blake2b:
        """`node_half` of its name."""
        ...

    @property
    def load(self) -> int: ...

    @property
    def most(self) -> int: ...


C = TypeVar("C", bound=Candidate)


def choose(user: UserKey, candidates: Sequence[C]) -> C | None:
    """The node for this user, or None when every candidate is full.

    The bound is ceil(1.25 x (all users + this one) / nodes), so there is always a node below it.
    """
    total = 1
    able: list[tuple[int, C]] = []
    for candidate in candidates:
        load = candidate.load
        if load < candidate.most:
            total += load
            able.append((load, candidate))
    if not able:
        return None
    bound = -(-total * _LOAD_NUMERATOR // (_LOAD_DENOMINATOR * len(able)))
    user_part = user_half(user)
    chosen: C | None = None
    best = b""
    for load, candidate in able:
        if load < bound:
            score = join_halves(candidate.half, user_part)
            # Of two equal scores the name decides, as in `favourite`.
            if score > best or (score == best and chosen and candidate.node_id > chosen.node_id):
                chosen, best = candidate, score
    return chosen
