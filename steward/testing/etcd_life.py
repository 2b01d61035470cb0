"""Registries on etcd under load, started again when they end, with every answer checked.

`Life` is a supervisor with one store after the other, and users who are placed,
released and placed again. What was acknowledged is remembered; `check` compares all of it with the
store and the ledger.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from registry_service.core.transactions import (
    Committed,
    JoinNode,
    NodeClaim,
    NodeJoined,
    Outcome,
    PlacementRead,
    PlacementReleased,
    PlaceUser,
    ReadPlacement,
    ReleasePlacement,
    StoreOperation,
    TargetRefused,
    TermLost,
    UserPlaced,
)
from registry_service.store.etcd import EtcdStore
from registry_service.store.etcd_client import EtcdAccess
from registry_service.store.etcd_standby import LEADER_TTL_S
from registry_service.store.port import StoreFailed
from steward.model.keys import NodeId, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.runtime.clock import boot_ms, wall_ms
from steward.testing.waiting import eventually

USERS = 6
SHORT_LEASE_S = 2
"""The shortest one, for tests that wait for the end of it."""
OPEN_S = 40.0


def store_on(
    endpoints: tuple[str, ...],
    cluster: str,
    home: Path,
    *,
    least_generation: int = 0,
    nodes_every_s: float = 30.0,
    keep_rows: int = 100_000,
    keep_violations: int = 100_000,
    clock: Callable[[], int] = boot_ms,
    lease_s: int = LEADER_TTL_S,
) -> EtcdStore:
    """A store that is not open; one `home` is for one at a time."""
    return EtcdStore(
        EtcdAccess(endpoints),
        cluster,
        home,
        wall_ms,
        clock,
        least_generation=least_generation,
        nodes_every_s=nodes_every_s,
        keep_rows=keep_rows,
        keep_violations=keep_violations,
        lease_s=lease_s,
    )


async def committed(store: EtcdStore, *operations: StoreOperation) -> Committed:
    outcome = await store.commit(operations)
    assert isinstance(outcome, Committed), outcome
    return outcome


async def join(store: EtcdStore, name: str = "n1", nonce: str = "a") -> NodeIncarnation:
    claim = NodeClaim(NodeId(name), "boot", nonce, "127.0.0.1:1")
    (joined,) = (await committed(store, JoinNode(claim))).results
    assert isinstance(joined, NodeJoined)
    return joined.record.incarnation


async def place(store: EtcdStore, user: UserKey, node: NodeIncarnation) -> Placement:
    (placed,) = (await committed(store, PlaceUser(user, node, "resolve"))).results
    assert isinstance(placed, UserPlaced)
    return placed.placement


async def read(store: EtcdStore, user: UserKey) -> PlacementRead:
    (found,) = (await committed(store, ReadPlacement(user))).results
    assert isinstance(found, PlacementRead)
    return found


class Life:
    """Load for as long as the block lasts. `served` counts what was acknowledged."""

    def __init__(
        self,
        endpoints: tuple[str, ...],
        cluster: str,
        home: Path,
        lease_s: int = LEADER_TTL_S,
    ) -> None:
        self._make = partial(store_on, endpoints, cluster, home, lease_s=lease_s)
        self.store = self._make()
        self.node: NodeIncarnation | None = None
        self.served = 0
        self.ended: list[str] = []
        self.slowest_s = 0.0
        # Of each user the highest epoch that was acknowledged, and whether that is how it is now.
        self._epochs: dict[UserKey, int] = {}
        self._settled: dict[UserKey, int | None] = {}
        self._reopening = asyncio.Lock()
        self._stopping = False
        self._workers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self.store.open()
        self.node = await join(self.store)
        for number in range(USERS):
            user = UserKey("acme", f"user-{number}")
            self._workers.append(asyncio.create_task(self._work(user)))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping = True
        if error is None:
            await asyncio.gather(*self._workers)
        for worker in self._workers:
            worker.cancel()
        await asyncio.wait(self._workers)
        await self.store.close()

    async def serves(self, more: int = 100, within_s: float = 30.0) -> None:
        """Wait until so many more were acknowledged."""
        wanted = self.served + more
        await eventually(lambda: self.served >= wanted or self._broken(), "it serves", within_s)

    def _broken(self) -> bool:
        for worker in self._workers:
            if worker.done():
                worker.result()
        return False

    async def _commit(self, operation: StoreOperation) -> Outcome | None:
        """None: not known; the store is another one now."""
        store = self.store
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            outcome = await store.commit((operation,))
        except StoreFailed as error:
            await self._reopen(store, str(error))
            return None
        if isinstance(outcome, TermLost):
            await self._reopen(store, str(outcome))
            return None
        self.slowest_s = max(self.slowest_s, clock() - began)
        return outcome

    async def _reopen(self, store: EtcdStore, why: str) -> None:
        """What a supervisor does when the process ends."""
        async with self._reopening:
            if self.store is not store:
                return
            self.ended.append(why)
            await store.close()
            new = self._make()
            async with asyncio.timeout(OPEN_S):
                await new.open()
            self.store = new

    async def _work(self, user: UserKey) -> None:
        assert self.node is not None
        while not self._stopping:
            outcome = await self._commit(PlaceUser(user, self.node, "resolve"))
            if not isinstance(outcome, Committed):
                self._settled.pop(user, None)
                continue
            (placed,) = outcome.results
            if isinstance(placed, TargetRefused):
                # The node's key was lost with its lease: the process joins again, as a new one.
                self.node = await join(self.store, nonce=f"after-{self.node.node_rev}")
                continue
            assert isinstance(placed, UserPlaced)
            epoch = placed.placement.epoch
            before = self._epochs.get(user, 0)
            # Placed anew, above all; or, when an answer was lost, where that had put the user.
            assert epoch > before or (not placed.created and epoch == before), (epoch, before)
            self._epochs[user], self._settled[user] = epoch, epoch
            self.served += 1
            release = ReleasePlacement(user, placed.placement.epoch, self.node, "idle")
            outcome = await self._commit(release)
            if not isinstance(outcome, Committed):
                self._settled.pop(user, None)
                continue
            (released,) = outcome.results
            assert isinstance(released, PlacementReleased) and released.deleted
            self._settled[user] = None
            self.served += 1

    async def check(self, store: EtcdStore) -> None:
        """What the store holds is what was acknowledged, and the ledger has no hole."""
        assert len(self._epochs) == USERS
        for user, epoch in self._settled.items():
            placement = (await read(store, user)).placement
            assert (placement.epoch if placement is not None else None) == epoch, user
        rows = (await store.ledger(None, 1_000_000))[::-1]
        assert [row.number for row in rows] == list(range(1, len(rows) + 1))
        placed = [(row.tenant, row.user, row.epoch) for row in rows if row.kind == "place"]
        assert len(set(placed)) == len(placed)
        for user, epoch in self._epochs.items():
            epochs = [row.epoch for row in rows if row.kind == "place" and row.user == user.user]
            assert epochs == sorted(epochs) and epoch in epochs
