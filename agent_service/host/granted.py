"""What the registry granted to this node, user by user, and how it is given back.

A grant is taken once, and only with a manager made from it is it spent. What was let go by plan
is remembered for a while: who comes late for it is no intruder. Decides nothing by itself.
"""

from collections import OrderedDict

from agent_service.core.grants import Grant, GrantBook, GrantRefused
from agent_service.host.ports import RegistryPort
from steward.model.keys import Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement

MOST_LET_GO = 10_000


class Granted:
    """The placements of one node incarnation. One event loop."""

    def __init__(self, registry: RegistryPort) -> None:
        self._registry = registry
        self._book: GrantBook | None = None
        # By plan.
        self._let_go: OrderedDict[UserKey, Epoch] = OrderedDict()

    @property
    def joined(self) -> bool:
        """Whether there is an incarnation that grants could be made out to."""
        return self._book is not None

    def join(self, incarnation: NodeIncarnation) -> None:
        """Before that there are no grants."""
        self._book = GrantBook(incarnation)

    def learn(self, placement: Placement) -> None:
        """The registry placed a user. After `join`."""
        assert self._book is not None
        self._book.learn(placement)

    async def take(self, user: UserKey, epoch: Epoch) -> Grant:
        """The grant for (user, epoch), once. Raises GrantRefused; and as `RegistryPort.confirm`."""
        assert self._book is not None
        try:
            return self._book.take(user, epoch)
        except GrantRefused as refused:
            if refused.kind not in ("unknown_placement", "forged_epoch"):
                raise
        # The push may be behind the edge's attach: ask once.
        placement = await self._registry.confirm(user)
        if placement is not None:
            self._book.learn(placement)
        return self._book.take(user, epoch)

    def give_back(self, user: UserKey, epoch: Epoch, cause: str) -> None:
        """Nobody has use for it here: whoever comes next needs a new placement."""
        self._forget(user, epoch)
        self._registry.release(user, epoch, cause)

    def let_go(
        self, user: UserKey, epoch: Epoch, cause: str, *, handoff: bool, activate: bool
    ) -> None:
        """Give it back by plan."""
        self._let_go.pop(user, None)
        self._let_go[user] = epoch
        if len(self._let_go) > MOST_LET_GO:
            self._let_go.popitem(last=False)
        self._forget(user, epoch)
        self._registry.release(user, epoch, cause, handoff, activate)

    def was_let_go(self, user: UserKey, epoch: Epoch) -> bool:
        """Whether this was the last that was given back of the user by plan."""
        return self._let_go.get(user) == epoch

    def say_again(self, user: UserKey, epoch: Epoch, cause: str, *, handoff: bool) -> None:
        """The registry asks for what was let go: it may have been told before it had the question.

        It waits for an answer, and a release says so, however often.
        """
        self._registry.release(user, epoch, cause, handoff, False)

    def _forget(self, user: UserKey, epoch: Epoch) -> None:
        if self._book is not None:
            self._book.forget(user, epoch)
