"""The ledger checked against the log, both ways, over all users.

- From the log: the highest epoch that was ever sealed for a user was granted to her: the ledger has
  a `place` or `takeover` of it.
- From the ledger: what tells of a manager that lived (a release that only a live manager makes) has
  a fence in the log that is at least as high: a log that was put back to a time before has not.
- In the ledger itself: the epochs of each user only grow.

The ledger is read before the fences, and a grant is in it before anybody can seal, so a cluster
in motion is no disagreement; what is found nevertheless is looked at once more in the rows that
came since. Users are taken in as many parts as it needs to hold no more than `MOST_GRANTS` grants;
each part reads all rows and all fences once.

Not covered: epochs older than the oldest row that is kept (etcd keeps a bounded number of rows);
these are counted.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from registry_service import convert
from registry_service.core.effects import AskFences
from registry_service.store.port import LedgerRow, PlacementStore
from steward.errors import Reason, StewardError
from steward.model.census import bucket_of, weight_of
from steward.model.keys import Epoch, UserKey
from steward.model.violations import ViolationKind
from steward.v1 import registry_service_pb2 as pb

PAGE: Final = 500
MOST_GRANTS: Final = 1_000_000
MOST_LISTED: Final = 100

GRANTS: Final = ("place", "takeover")
OF_THE_LIVING: Final = ("passivated",)
"""Causes of releases that come from a live manager alone."""

ReadFences = Callable[[Callable[[int], AskFences]], Awaitable[pb.ReportFences | str]]


@dataclass(slots=True)
class Checked:
    """How far it is. `found` counts all; `disagreements` lists the first."""

    rows: int = 0
    fences: int = 0
    not_kept: int = 0
    found: int = 0
    disagreements: list[pb.CensusFinding] = field(default_factory=list)

    def add(self, kind: ViolationKind, user: UserKey, epoch: int, evidence: str) -> None:
        self.found += 1
        if len(self.disagreements) < MOST_LISTED:
            self.disagreements.append(
                pb.CensusFinding(
                    kind=kind.value, user=convert.user_out(user), epoch=epoch, evidence=evidence
                )
            )


class _Grants:
    """What the ledger says of some users."""

    def __init__(self, part: int, parts: int) -> None:
        self._part = part
        self._parts = parts
        # Hashes of (user, epoch): a set of numbers, since there are many.
        self._granted: set[int] = set()
        self.lived: dict[UserKey, int] = {}
        self._last: dict[UserKey, int] = {}

    def covers(self, user: UserKey) -> bool:
        return bucket_of(user) % self._parts == self._part

    def take(self, row: LedgerRow, checked: Checked) -> None:
        user = UserKey(row.tenant, row.user)
        if not row.user or not self.covers(user):
            return
        if row.kind in GRANTS:
            self._granted.add(weight_of(user, Epoch(row.epoch)))
            before = self._last.get(user, 0)
            if row.epoch <= before:
                text = f"row {row.number} grants {row.epoch}, after {before}"
                checked.add(ViolationKind.EPOCH_WENT_DOWN, user, row.epoch, text)
            self._last[user] = max(row.epoch, before)
        elif row.kind == "release" and row.cause in OF_THE_LIVING:
            self.lived[user] = max(self.lived.get(user, 0), row.epoch)

    def has(self, user: UserKey, epoch: Epoch) -> bool:
        return weight_of(user, epoch) in self._granted


async def check_ledger(store: PlacementStore, read_fences: ReadFences) -> AsyncIterator[Checked]:
    """Check everything; says now and then how far it is, and ends with the result.

    Raises StewardError: MANAGER_UNAVAILABLE when no node can read the log, STORE_UNAVAILABLE;
    StoreFailed.
    """
    checked = Checked()
    parts = store.mark.ledger // MOST_GRANTS + 1
    for part in range(parts):
        grants = _Grants(part, parts)
        last = 0
        oldest: LedgerRow | None = None
        while rows := await store.ledger_after(last, PAGE):
            oldest = oldest or rows[0]
            for row in rows:
                grants.take(row, checked)
            last = rows[-1].number
            checked.rows += len(rows)
            if checked.rows % (100 * PAGE) == 0:
                yield checked
        # Of a trimmed ledger: grants before this epoch may have gone.
        kept_from = _epoch_of(oldest) if oldest is not None and oldest.number > 1 else 0
        unknown: list[tuple[UserKey, Epoch]] = []
        after: UserKey | None = None
        more = True
        while more:
            page = await read_fences(partial(AskFences, after=after))
            if isinstance(page, str):
                raise StewardError(Reason.MANAGER_UNAVAILABLE, f"the log can't be asked: {page}")
            more = page.more
            for owned in page.fences:
                user, fence = convert.user_in(owned.user), convert.epoch_in(owned.epoch)
                after = user
                if not grants.covers(user):
                    continue
                checked.fences += 1
                lived = grants.lived.pop(user, 0)
                if lived > fence:
                    text = f"the ledger has a manager under {lived}; the log's fence is {fence}"
                    checked.add(ViolationKind.UNSEALED_MANAGER, user, lived, text)
                if not grants.has(user, fence):
                    unknown.append((user, fence))
            yield checked
        for user, lived in grants.lived.items():
            text = f"the ledger has a manager under {lived}; the log has no fence of this user"
            checked.add(ViolationKind.UNSEALED_MANAGER, user, lived, text)
        if unknown:
            while rows := await store.ledger_after(last, PAGE):
                for row in rows:
                    grants.take(row, checked)
                last = rows[-1].number
        for user, fence in unknown:
            if grants.has(user, fence):
                continue
            if fence < kept_from:
                checked.not_kept += 1
                continue
            text = f"the log's fence is {fence}; the ledger has no grant of it"
            checked.add(ViolationKind.FENCE_ABOVE_REGISTRY, user, fence, text)
    yield checked


def _epoch_of(row: LedgerRow) -> int:
    """An epoch that is at most that of any grant from this row on."""
    return row.epoch or row.revision
