"""The `PlacementStore` port: what the registry needs of its store, whichever engine is behind it.

Linearizable, and every operation compares before it writes. Every adapter passes the
one conformance suite (`tests/integration/registry_store/test_store_conformance.py`), which is the
meaning of the operations in `registry_service.core.transactions`. Ledger rows are
written in the same transaction as what they tell of.
"""

from asyncio import Future
from dataclasses import dataclass
from typing import Protocol

from registry_service.core.transactions import Outcome, StoreOperation, StoreView
from registry_service.store.violation_table import ViolationRow, ViolationTotals
from steward.model.keys import Epoch, Revision, UserKey
from steward.model.placement import Placement
from steward.model.violations import Severity


class StoreFailed(Exception):
    """The engine failed for good (EIO, disk full, corrupt): stop the process, as if killed."""


class LeadershipOver(Exception):
    """This process may not speak for the store any more, since another may: it has to end.

    Raised by the clock that a store gives to the machine; no fault of either.
    """


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One line of the ledger (P19).

    `kind` is join, place, takeover, release, drain, fence or generation. `revision` is the one
    that the change made. Fields that do not apply are empty or 0. `at_ms` is Unix time, for people.
    """

    number: int
    revision: int
    at_ms: int
    kind: str
    tenant: str = ""
    user: str = ""
    epoch: int = 0
    node_id: str = ""
    node_rev: int = 0
    cause: str = ""
    evidence: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class StoreMark:
    """How far the store is, after some transaction: all of one moment.

    `ledger` and `violations` are the numbers of the newest rows, ever. Every placement that is
    there has an epoch of at most `epoch`, and every later one has a higher.
    """

    ledger: int
    violations: int
    revision: Revision
    epoch: Epoch


START = StoreMark(0, 0, Revision(0), Epoch(0))


class PlacementStore(Protocol):
    """The durable truth about placements and nodes. One opener at a time; all calls on one loop."""

    async def open(self) -> StoreView:
        """Take the store and raise its term. Raises EnvironmentUnusable when it can't be had."""
        ...

    def commit(self, operations: tuple[StoreOperation, ...]) -> "Future[Outcome]":
        """Start a transaction; never blocks. Outcomes come in the order of the calls.

        The future fails with StoreFailed alone. It is `TermLost` when another opener raised the
        term: then nothing of this batch is done, nor of any later one.
        """
        ...

    @property
    def mark(self) -> StoreMark:
        """Of the newest transaction that is durable; at least as new as any outcome given."""
        ...

    # Readers. They see at least what was durable when they were called.

    async def ledger(self, user: UserKey | None, limit: int) -> list[LedgerRow]:
        """The newest rows (of one user, if given), newest first."""
        ...

    async def ledger_after(self, number: int, limit: int) -> list[LedgerRow]:
        """The first rows after a number, ascending."""
        ...

    async def placements(self, after: UserKey | None, limit: int, newest: Epoch) -> list[Placement]:
        """A page of the placements on living nodes with an epoch of at most `newest`, by user."""
        ...

    async def violations(
        self, after: int, limit: int, severity: Severity | None = None, newest: bool = False
    ) -> list[ViolationRow]:
        """Violations after a number, ascending: the first `limit` of them, or the newest."""
        ...

    async def violation_totals(self) -> ViolationTotals:
        """How many were ever recorded."""
        ...

    async def close(self) -> None:
        """Finish what was committed and let go. Safe to call twice."""
        ...


# One wording for all adapters, since people compare rows.


def moved_from(node_id: str, node_rev: int, epoch: int) -> str:
    """The evidence of a takeover: where the user was."""
    return f"was on {node_id}/{node_rev} under {epoch}, which is not alive"


def handed_off_from(node_id: str, node_rev: int, epoch: int) -> str:
    """The evidence of a planned takeover: who let the user go."""
    return f"was on {node_id}/{node_rev} under {epoch}, which handed it off"
