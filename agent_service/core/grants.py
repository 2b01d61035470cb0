"""Grants: the only way to a manager is a placement that the registry made out to this incarnation.

The host feeds the `GrantBook` with placements from its registry session; `take` hands
out a `Grant`, once per placement, and a `Manager` accepts nothing else. A placement for
another node, a forged one, a stale epoch, or a second use all end in `GrantRefused`. In
one Python process this can't stop code that is set on breaking in; it does stop every
path that code takes by accident, and the log's fence stops the rest.
"""

import sys
from dataclasses import dataclass
from typing import NoReturn, Self

from steward.model.keys import Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement

REFUSAL = (
    "a manager is made only by the host of an agent node, from a placement that the registry "
    "granted: attach through an edge, or resolve the user with RegistryService.ResolveManagers"
)

AUDIT_EVENT = "steward.manager.refused"
"""Name of the audit event (`sys.addaudithook`) of a construction that was refused."""


def refuse_construction(how: str) -> NoReturn:
    """Raise RuntimeError that names the right way, after an audit event that the host counts."""
    sys.audit(AUDIT_EVENT, how)
    raise RuntimeError(f"a manager or its grant can't be made {how}: {REFUSAL}")


@dataclass(frozen=True, slots=True)
class GrantRefused(Exception):
    """No grant. `kind` is the violation's kind; `known` the epoch that the book holds, or 0."""

    kind: str
    known: Epoch


class Grant:
    """Proof of a granted placement, good for one manager. Made by `GrantBook.take` alone."""

    __slots__ = ("_spent", "placement")

    def __new__(cls, *arguments: object) -> Self:
        placement, book = arguments if len(arguments) == 2 else (None, None)
        if not isinstance(book, GrantBook) or not book.issues(placement):
            refuse_construction("outside of a grant book")
        return super().__new__(cls)

    def __init__(self, placement: Placement, book: "GrantBook") -> None:
        self.placement = placement
        self._spent = False

    def spend(self) -> Placement:
        """Use the grant up. Raises RuntimeError at the second use."""
        if self._spent:
            refuse_construction("twice from one grant")
        self._spent = True
        return self.placement

    def __init_subclass__(cls) -> None:
        refuse_construction("by a subclass")

    def __reduce_ex__(self, _: object) -> NoReturn:
        refuse_construction("by copying or pickling")


class GrantBook:
    """The placements that the registry has granted to this incarnation, newest epoch per user."""

    def __init__(self, incarnation: NodeIncarnation) -> None:
        self._incarnation = incarnation
        self._granted: dict[UserKey, Placement] = {}
        self._issuing: Placement | None = None
        self._taken: dict[UserKey, Epoch] = {}

    def learn(self, placement: Placement) -> None:
        """Remember a placement of the registry; older epochs, other incarnations are ignored."""
        if placement.incarnation != self._incarnation:
            return
        known = self._granted.get(placement.user)
        if known is None or known.epoch < placement.epoch:
            self._granted[placement.user] = placement

    def forget(self, user: UserKey, epoch: Epoch) -> None:
        """Drop a placement whose manager is gone, so that the book holds no more than the node."""
        known = self._granted.get(user)
        if known is not None and known.epoch <= epoch:
            del self._granted[user]
        if self._taken.get(user, 0) <= epoch:
            self._taken.pop(user, None)

    def known_epoch(self, user: UserKey) -> Epoch:
        """The newest granted epoch of a user, 0 when there is none."""
        known = self._granted.get(user)
        return known.epoch if known else Epoch(0)

    def issues(self, placement: object) -> bool:
        """Whether this book is handing out exactly this placement right now."""
        return placement is not None and self._issuing is placement

    def take(self, user: UserKey, epoch: Epoch) -> Grant:
        """The grant for (user, epoch), once. Raises GrantRefused.

        Kinds: `unknown_placement`, `stale_epoch`, `forged_epoch` (higher than any granted),
        `second_manager` (a manager was already made under this epoch).
        """
        placement = self._granted.get(user)
        if placement is None:
            raise GrantRefused("unknown_placement", Epoch(0))
        if epoch < placement.epoch:
            raise GrantRefused("stale_epoch", placement.epoch)
        if epoch > placement.epoch:
            raise GrantRefused("forged_epoch", placement.epoch)
        if self._taken.get(user) == epoch:
            raise GrantRefused("second_manager", placement.epoch)
        self._taken[user] = epoch
        self._issuing = placement
        try:
            return Grant(placement, self)
        finally:
            self._issuing = None
