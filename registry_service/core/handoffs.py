"""What one node has to hand off: who waits for it, and who is asked for.

Waves without a timer: at most so many users are open at the node, and the next is asked for
when one was let go. A draining node's users are read from the store page by page, so that
those count too whom the cache does not know.
"""

from collections import deque

from registry_service.core.effects import OwnedUser
from steward.model.keys import Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement


class Handoffs:
    """The handoffs of one incarnation. Mutated by `Moves` alone."""

    __slots__ = ("after", "asked_ms", "incarnation", "listed", "listing", "open", "waiting")

    def __init__(self, incarnation: NodeIncarnation, *, drain: bool) -> None:
        self.incarnation = incarnation
        self.waiting: deque[OwnedUser] = deque()
        # Asked for and not answered, oldest first: under which epoch, and since when.
        self.open: dict[UserKey, Epoch] = {}
        self.asked_ms: dict[UserKey, int] = {}
        # Where the reading of the store is; without a drain there is nothing to read.
        self.after: UserKey | None = None
        self.listing = False
        self.listed = not drain

    @property
    def idle(self) -> bool:
        return self.listed and not self.waiting and not self.open

    def ask(self, owned: OwnedUser, now_ms: int) -> None:
        self.open[owned.user] = owned.epoch
        self.asked_ms[owned.user] = now_ms

    def close(self, user: UserKey, epoch: Epoch) -> int | None:
        """It was let go, or is over; since when it was asked for, None if it was not."""
        if self.open.get(user) != epoch:
            return None
        del self.open[user]
        return self.asked_ms.pop(user)

    def add_page(self, placements: tuple[Placement, ...], more: bool) -> None:
        self.listing = False
        self.listed = not more
        if placements:
            self.after = placements[-1].user
        self.waiting.extend(OwnedUser(each.user, each.epoch) for each in placements)

    def overdue(self, since_ms: int) -> None:
        """Put those that were asked for before `since_ms` behind all others."""
        while self.asked_ms:
            user, asked_ms = next(iter(self.asked_ms.items()))
            if asked_ms > since_ms:
                return
            del self.asked_ms[user]
            self.waiting.append(OwnedUser(user, self.open.pop(user)))

    def next_overdue_ms(self) -> int | None:
        return next(iter(self.asked_ms.values()), None)
