"""Open runs that nobody continues: found in the log's index, and given a manager (P20).

Every node looks through its rendezvous share of the users with an open run: at the start, when
the nodes change, and every 30 s. It names those without a manager here to the registry, which
places whoever is nowhere; who lives on another node stays there. So a run whose user has gone
ends too, also after all processes were killed at once. Paced: 500 users at a time, 2,000 a second.

Not guaranteed: that a user is named once, or by one node only, while nodes come and go.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence

from agent_service.log.port import EventLog
from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, NodeId, UserKey
from steward.model.rendezvous import favourite
from steward.telemetry.logs import fields

PAGE_USERS = 500
PAGE_PAUSE_S = 0.25
EVERY_S = 30.0
RETRY_S = 1.0

_log = logging.getLogger(__name__)


class OrphanScan:
    """The scans of one node. `run` as one task; `members` whenever the registry tells them."""

    def __init__(
        self,
        log: EventLog,
        node_id: NodeId,
        owned: Callable[[], Iterable[tuple[UserKey, Epoch]]],
        adopt: Callable[[Sequence[UserKey]], bool],
        *,
        page_users: int = PAGE_USERS,
        page_pause_s: float = PAGE_PAUSE_S,
        every_s: float = EVERY_S,
    ) -> None:
        """`owned`: who has a manager here. `adopt` names users to the registry; False: not sent."""
        self._log = log
        self._node_id = node_id
        self._owned = owned
        self._adopt = adopt
        self._page_users = page_users
        self._page_pause_s = page_pause_s
        self._every_s = every_s
        self._members: tuple[NodeId, ...] = ()
        self._changed = asyncio.Event()

    def members(self, node_ids: Iterable[NodeId]) -> None:
        """The nodes that take users now; another scan begins when they are not as before."""
        members = tuple(sorted(node_ids))
        if members != self._members:
            self._members = members
            self._changed.set()

    async def run(self) -> None:
        """Scan until cancelled. Raises LogFailed when the log failed for good."""
        await self._changed.wait()
        while True:
            self._changed.clear()
            rest_s = self._every_s
            try:
                await self._scan()
            except StewardError as error:
                _log.info("open runs could not be looked through", extra=fields(why=error.message))
                rest_s = min(RETRY_S, rest_s)
            try:
                async with asyncio.timeout(rest_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _scan(self) -> None:
        """Once through the index. Raises StewardError when log or registry are away."""
        after: UserKey | None = None
        # A node that takes no users has no share; it is asked anew before each page.
        while self._node_id in self._members:
            page = await self._log.open_runs(after, self._page_users)
            orphans = self._orphans(page.users)
            if orphans and not self._adopt(orphans):
                raise StewardError(Reason.MANAGER_UNAVAILABLE, "the registry is out of reach")
            if not page.more:
                return
            after = page.users[-1]
            await asyncio.sleep(self._page_pause_s)

    def _orphans(self, users: Sequence[UserKey]) -> list[UserKey]:
        if not users:
            return []
        here = {user for user, _ in self._owned()}
        members, node_id = self._members, self._node_id
        return [user for user in users if user not in here and favourite(user, members) == node_id]
