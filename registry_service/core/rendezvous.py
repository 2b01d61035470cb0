"""Which node a new user should live on: rendezvous hashing with bounded loads.

The user goes to the highest score among the nodes that carry less than 1.25 times the mean. So
users spread evenly, and a node that comes or goes moves only its own share. The choice is a
suggestion: it is never unsafe, whatever it is.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from steward.model.keys import NodeId, UserKey
from steward.model.rendezvous import favourite

_LOAD_NUMERATOR = 5
_LOAD_DENOMINATOR = 4


class Candidate(Protocol):
    """A node that could take a user. `load` counts users; `room` is how many more it takes."""

    @property
    def node_id(self) -> NodeId: ...

    @property
    def load(self) -> int: ...

    @property
    def room(self) -> int: ...


C = TypeVar("C", bound=Candidate)


def choose(user: UserKey, candidates: Sequence[C]) -> C | None:
    """The node for this user, or None when every candidate is full.

    The bound is ceil(1.25 x (all users + this one) / nodes), so there is always a node below it.
    """
    able = [(candidate.load, candidate) for candidate in candidates if candidate.room]
    if not able:
        return None
    total = 1
    for load, _ in able:
        total += load
    bound = -(-total * _LOAD_NUMERATOR // (_LOAD_DENOMINATOR * len(able)))
    below = {candidate.node_id: candidate for load, candidate in able if load < bound}
    return below[favourite(user, below)]
