"""Managers that nobody needs, and since when: what passivation (P17) looks through.

In order of the last time that somebody needed them, so that a sweep looks at those alone
that are due. Whether a manager is idle it says itself, when it is noted and again when it is due.
"""

from collections import OrderedDict

from agent_service.core.manager import Manager
from steward.model.keys import UserKey


class UnneededManagers:
    """The idle managers of a node, longest first. Times are of one clock that never goes back."""

    def __init__(self) -> None:
        self._since: OrderedDict[UserKey, tuple[Manager, int]] = OrderedDict()

    def note(self, manager: Manager, now_ms: int) -> None:
        """Something happened to this manager; if it is idle now, its time begins."""
        if manager.idle and not manager.over:
            self._since.pop(manager.user, None)
            self._since[manager.user] = (manager, now_ms)

    def forget(self, user: UserKey) -> None:
        self._since.pop(user, None)

    def due(self, before_ms: int) -> list[Manager]:
        """Those that have been idle since `before_ms` or longer; they are not kept any more."""
        found: list[Manager] = []
        while self._since:
            user, (manager, since_ms) = next(iter(self._since.items()))
            if since_ms > before_ms:
                break
            del self._since[user]
            if not manager.over and manager.idle:
                found.append(manager)
        return found
