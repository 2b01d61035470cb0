"""The registry's placements as the census has them: read from the store once, then followed.

After the first reading each step takes the rows of the ledger that are new, which are written in
the transaction of the change that they tell of. So that an error in this copy, or a row that was
changed behind the registry's back, does not last, each step also reads one page of the placements
themselves, the next one of all, and believes the page: 100,000 users within 200 steps.
"""

from registry_service.core.census import Placed, PlacementIndex
from registry_service.store.port import LedgerRow, PlacementStore
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, UserKey

PAGE = 500
MOST_ROWS = 100_000
"""Rows behind which reading everything anew is cheaper."""


class PlacementFollower:
    """Keeps `index` up with the store. One caller at a time."""

    def __init__(self, store: PlacementStore) -> None:
        self.index = PlacementIndex()
        self._store = store
        self._number: int | None = None
        self._page_after: UserKey | None = None
        self.corrected = 0
        """Users whom a page showed elsewhere than the ledger said. More than none is an error."""

    async def advance(self) -> None:
        """Take in what is durable by now. Raises StoreFailed, StewardError(STORE_UNAVAILABLE)."""
        last = self._store.mark.ledger
        if self._number is None or not 0 <= last - self._number <= MOST_ROWS:
            await self._read_all()
            return
        while self._number < self._store.mark.ledger:
            rows = await self._store.ledger_after(self._number, PAGE)
            if not rows:
                break  # Not kept any more, or not readable yet: the next step sees.
            if rows[0].number != self._number + 1:
                await self._read_all()
                return
            for row in rows:
                self._apply(row)
            self._number = rows[-1].number

    async def check_page(self) -> None:
        """Read the next page of placements and put right what differs. Raises as `advance`."""
        mark = self._store.mark
        page = await self._store.placements(self._page_after, PAGE, mark.epoch)
        known = {placement.user: self.index.get(placement.user) for placement in page}
        await self.advance()
        for placement in page:
            user, placed = placement.user, Placed(placement.incarnation, placement.epoch)
            now = self.index.get(user)
            # Who was changed meanwhile is none of this page any more.
            if now == known[user] and now != placed:
                self.index.put(user, placed)
                self.corrected += 1
        self._page_after = page[-1].user if len(page) == PAGE else None

    async def _read_all(self) -> None:
        mark = self._store.mark
        index = PlacementIndex()
        after: UserKey | None = None
        while True:
            page = await self._store.placements(after, PAGE, mark.epoch)
            for placement in page:
                index.put(placement.user, Placed(placement.incarnation, placement.epoch))
            if len(page) < PAGE:
                break
            after = page[-1].user
        self.index, self._number = index, mark.ledger
        # A page shows its own moment: what changed while the pages were read is in the ledger.
        await self.advance()

    def _apply(self, row: LedgerRow) -> None:
        node = NodeIncarnation(NodeId(row.node_id), NodeRev(row.node_rev))
        self.index.apply(row.kind, UserKey(row.tenant, row.user), Epoch(row.epoch), node)
