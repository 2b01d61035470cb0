"""Reads of the store on etcd that are no part of a transaction of the machine: for operators.

They read etcd, linearizably, in pages. While it does not answer they raise
StewardError(STORE_UNAVAILABLE), as every read of an operator does when its engine is away.
"""

from collections.abc import AsyncGenerator
from heapq import merge

from registry_service.store.etcd_client import EtcdAway, EtcdClient, EtcdError, prefix_end
from registry_service.store.etcd_keys import Keys, load_placement, load_rows, load_violation
from registry_service.store.etcd_state import State
from registry_service.store.etcd_watch import list_range
from registry_service.store.etcdpb import steward_etcd_pb2 as pb
from registry_service.store.port import LedgerRow
from registry_service.store.violation_table import ViolationRow
from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, UserKey
from steward.model.placement import Placement
from steward.model.violations import Severity

WITHIN_S = 5.0
_WINDOW = 2_000
"""Rows of the ledger that are looked through at a time, from its end."""


class EtcdReader:
    """Reads ledger, placements and violations. `state` says who lives and what is kept."""

    def __init__(self, client: EtcdClient, keys: Keys, state: State) -> None:
        self._client = client
        self._keys = keys
        self._state = state

    async def ledger(self, user: UserKey | None, limit: int, last: int) -> list[LedgerRow]:
        """The newest rows of those up to `last`, newest first."""
        found: list[LedgerRow] = []
        end = last + 1
        while end > 1 and len(found) < limit:
            start = max(1, end - _WINDOW)
            window = [
                row
                async for row in self._rows(start, end)
                if user is None or (row.tenant, row.user) == user
            ]
            found += reversed(window)
            if start <= self._state.head.ledger - self._state.kept.most_rows:
                break
            end = start
        return found[:limit]

    async def ledger_after(self, number: int, limit: int) -> list[LedgerRow]:
        """The first rows after a number, ascending."""
        found: list[LedgerRow] = []
        async for row in self._rows(number + 1, None):
            if len(found) == limit:
                break
            found.append(row)
        return found

    async def _rows(self, start: int, end: int | None) -> AsyncGenerator[LedgerRow, None]:
        """Rows with numbers from `start` to before `end`. A key has the number of its last row."""
        async for kv in self._keys_of(self._keys.row(start), prefix_end(self._keys.ledger)):
            for row in load_rows(kv.value):
                if end is not None and row.number >= end:
                    return
                if row.number >= start:
                    yield row

    async def placements(self, after: UserKey | None, limit: int, newest: Epoch) -> list[Placement]:
        """Placements on living nodes with an epoch of at most `newest`, in the order of keys."""
        keys = self._keys
        start = keys.placements if after is None else keys.placement(after) + b"\0"
        found: list[Placement] = []
        async for kv in self._keys_of(start, prefix_end(keys.placements)):
            if len(found) == limit:
                break
            placement = load_placement(keys.user_of(kv.key), kv.value)
            if placement.epoch <= newest and self._state.lives(placement.incarnation):
                found.append(placement)
        return found

    async def violations(
        self, after: int, limit: int, severity: Severity | None, newest: bool
    ) -> list[ViolationRow]:
        """Violations after a number, ascending: the first `limit` of them, or the newest."""
        parts = [
            await self._of_severity(each, after, limit, newest)
            for each in ((severity,) if severity is not None else tuple(Severity))
        ]
        rows = list(merge(*parts, key=lambda row: row.number))
        return rows[-limit:] if newest else rows[:limit]

    async def _of_severity(
        self, severity: Severity, after: int, limit: int, newest: bool
    ) -> list[ViolationRow]:
        numbers = self._state.kept.numbers[severity]
        if newest and len(numbers) > limit:
            after = max(after, numbers[-limit] - 1)
        start = self._keys.violation(severity, after + 1)
        found: list[ViolationRow] = []
        async for kv in self._keys_of(start, prefix_end(self._keys.of_severity(severity))):
            if len(found) == limit:
                break
            found.append(load_violation(kv.value))
        return found

    async def _keys_of(self, start: bytes, end: bytes) -> AsyncGenerator[pb.KeyValue, None]:
        try:
            async for page in list_range(self._client, start, end, within_s=WITHIN_S):
                for kv in page.kvs:
                    yield kv
        except (EtcdError, EtcdAway) as error:
            raise StewardError(Reason.STORE_UNAVAILABLE, str(error)) from None
