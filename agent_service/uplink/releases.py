"""Placements that this node gives back: kept until the registry has answered.

Guarantees: what was said once about a placement (why, whether it is a handoff) is said again
in the same words until it is answered, on whichever stream; whatever comes later about the same
(user, epoch) is ignored, since the first may have been carried out already. Bounded: beyond
`MOST_RELEASES` the oldest are forgotten, and the registry finds out when their users are resolved.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from steward.model.keys import Epoch, UserKey

MOST_RELEASES = 100_000
MOST_PER_MESSAGE = 512

OwnedUser = tuple[UserKey, Epoch]


class Release(NamedTuple):
    """One placement, given back. `handoff` and `activate` are those of `RegistryPort.release`."""

    user: UserKey
    epoch: Epoch
    cause: str
    handoff: bool
    activate: bool


class Releases:
    """The releases without an answer, oldest first."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[OwnedUser, Release] = OrderedDict()
        # Request → what it named; of the stream that is up.
        self._asked: dict[int, Sequence[Release]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, release: Release) -> bool:
        """Keep it; whether it is new."""
        key = (release.user, release.epoch)
        if key in self._waiting:
            return False
        self._waiting[key] = release
        if len(self._waiting) > MOST_RELEASES:
            self._waiting.popitem(last=False)
        return True

    def again(self) -> Iterable[Sequence[Release]]:
        """All of it in message sizes, for a new stream; what was asked on the old one is void."""
        self._asked.clear()
        waiting = list(self._waiting.values())
        return [
            waiting[start : start + MOST_PER_MESSAGE]
            for start in range(0, len(waiting), MOST_PER_MESSAGE)
        ]

    def asked(self, request_id: int, part: Sequence[Release]) -> None:
        """This part is on its way."""
        self._asked[request_id] = part

    def answered(self, request_id: int) -> None:
        """The registry has dealt with that part."""
        for release in self._asked.pop(request_id, ()):
            self._waiting.pop((release.user, release.epoch), None)
