"""The `PlacementStore` port: what the registry needs of its store, whichever engine is behind it.

Linearizable, and every operation compares before it writes. Every adapter passes the
one conformance suite (`tests/integration/registry/test_store_conformance.py`), which is the
meaning of the operations in `registry_service.core.transactions`. Ledger rows are
written in the same transaction as what they tell of.
"""

from asyncio import Future
from dataclasses import dataclass
from typing import Protocol

from registry_service.core.transactions import Outcome, StoreOperation, StoreView
from steward.model.keys import UserKey


class StoreFailed(Exception):
    """The engine failed for good (EIO, disk full, corrupt): stop the process, as if killed."""


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One line of the ledger (P19).

    `kind` is join, place, takeover, release, drain, fence or refusal. `revision` is the store's
    when it was written; a refusal changes nothing and has the revision of the row before it.
    Fields that do not apply are empty or 0. `at_ms` is Unix time, for people.
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

    async def ledger(self, user: UserKey | None, limit: int) -> list[LedgerRow]:
        """The newest rows (of one user, if given), newest first."""
        ...

    async def close(self) -> None:
        """Finish what was committed and let go. Safe to call twice."""
        ...


# One wording for all adapters, since people compare rows.


def moved_from(node_id: str, node_rev: int, epoch: int) -> str:
    """The evidence of a takeover: where the user was."""
    return f"was on {node_id}/{node_rev} under {epoch}, which is not alive"
