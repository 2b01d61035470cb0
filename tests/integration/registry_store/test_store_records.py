"""What the stores record and how it is read, the same for every engine."""

from collections.abc import Callable
from pathlib import Path

import pytest

from registry_service.core.transactions import (
    Committed,
    Evidence,
    FenceNode,
    JoinNode,
    NodeClaim,
    NodeJoined,
    PlaceUser,
    RecordViolation,
    ReleasePlacement,
    StoreOperation,
    StoreResult,
    TermLost,
    UserPlaced,
    ViolationRecorded,
)
from registry_service.store.etcd import EtcdStore
from registry_service.store.etcd_client import EtcdAccess
from registry_service.store.memory import MemoryDisk, MemoryStore
from registry_service.store.port import PlacementStore
from registry_service.store.sqlite import SqliteStore
from registry_service.store.violation_table import ViolationTotals
from steward.model.keys import NodeId, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.model.violations import Violation, ViolationKind
from steward.runtime.clock import boot_ms

pytestmark = pytest.mark.asyncio

REFUSAL = RecordViolation(Violation(ViolationKind.STALE_APPEND, "fence 5"), "agent:n1")
BREACH = RecordViolation(Violation(ViolationKind.FOREIGN_EVENT, "of bob"), "edge:e1")
Make = Callable[[], PlacementStore]


@pytest.fixture(params=["memory", "sqlite", "etcd"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Makes an opener of one store."""
    if request.param == "memory":
        disk = MemoryDisk(lambda: 1_000)
        return lambda: MemoryStore(disk)
    if request.param == "sqlite":
        return lambda: SqliteStore(tmp_path / "registry.db", lambda: 1_000)
    access = EtcdAccess(request.getfixturevalue("etcd").endpoints)
    name: str = request.getfixturevalue("cluster_name")
    return lambda: EtcdStore(access, name, tmp_path, lambda: 1_000, boot_ms)


async def commit(store: PlacementStore, *operations: StoreOperation) -> tuple[StoreResult, ...]:
    outcome = await store.commit(operations)
    assert isinstance(outcome, Committed)
    return outcome.results


async def join(store: PlacementStore, node_id: str) -> NodeIncarnation:
    claim = NodeClaim(NodeId(node_id), "boot", f"nonce-{node_id}", "10.0.0.1:7")
    (joined,) = await commit(store, JoinNode(claim))
    assert isinstance(joined, NodeJoined)
    return joined.record.incarnation


async def place(store: PlacementStore, user: UserKey, node: NodeIncarnation) -> Placement:
    (placed,) = await commit(store, PlaceUser(user, node, "asked"))
    assert isinstance(placed, UserPlaced)
    return placed.placement


def users(*names: str) -> list[UserKey]:
    return [UserKey("acme", name) for name in names]


async def test_violations_get_their_numbers_in_the_transaction_and_survive(make: Make) -> None:
    store = make()
    await store.open()
    assert await commit(store, REFUSAL, BREACH) == (ViolationRecorded(1), ViolationRecorded(2))
    assert store.mark.violations == 2
    await store.close()
    store = make()
    await store.open()
    assert store.mark.violations == 2
    assert await commit(store, REFUSAL) == (ViolationRecorded(3),)
    assert [row.number for row in await store.violations(1, 10)] == [2, 3]
    assert await store.violation_totals() == ViolationTotals(2, 1)
    await store.close()


async def test_a_violation_changes_neither_revision_nor_ledger(make: Make) -> None:
    store = make()
    await store.open()
    await join(store, "n1")
    before = store.mark
    await commit(store, REFUSAL)
    after = store.mark
    assert (after.revision, after.epoch, after.ledger) == (
        before.revision,
        before.epoch,
        before.ledger,
    )
    assert after.violations == before.violations + 1
    await store.close()


async def test_an_opener_that_lost_its_term_records_nothing(tmp_path: Path) -> None:
    disk = MemoryDisk(lambda: 1_000)
    old, new = MemoryStore(disk), MemoryStore(disk)
    await old.open()
    await new.open()
    assert isinstance(await old.commit((REFUSAL,)), TermLost)
    assert await new.violations(0, 10) == []


async def test_the_ledger_is_read_on_from_a_number(make: Make) -> None:
    store = make()
    await store.open()
    node = await join(store, "n1")
    ann, bob = users("ann", "bob")
    placed = await place(store, ann, node)
    await place(store, bob, node)
    await commit(store, ReleasePlacement(ann, placed.epoch, node, "idle"))
    assert store.mark.ledger == 4
    kinds = [(row.number, row.kind, row.user) for row in await store.ledger_after(1, 2)]
    assert kinds == [(2, "place", "ann"), (3, "place", "bob")]
    assert [row.kind for row in await store.ledger_after(3, 100)] == ["release"]
    assert await store.ledger_after(4, 100) == []
    await store.close()
    store = make()
    await store.open()
    assert store.mark.ledger == 4
    await store.close()


async def test_current_placements_are_those_of_living_nodes_up_to_a_moment(make: Make) -> None:
    store = make()
    await store.open()
    first, second = await join(store, "n1"), await join(store, "n2")
    ann, bob, cyd, dan, eve = users("ann", "bob", "cyd", "dan", "eve")
    placed = {user: await place(store, user, first) for user in (cyd, ann)}
    placed[dan] = await place(store, dan, second)
    moment = store.mark.epoch
    await place(store, bob, first)
    pages = [
        await store.placements(None, 2, moment),
        await store.placements(cyd, 2, moment),
        await store.placements(dan, 2, moment),
    ]
    assert pages == [[placed[ann], placed[cyd]], [placed[dan]], []]
    await commit(store, FenceNode(second, "lost", Evidence.PROOF))
    assert await store.placements(bob, 10, store.mark.epoch) == [placed[cyd]]
    assert (await store.placements(None, 10, store.mark.epoch))[0].user == ann
    assert eve not in [p.user for p in await store.placements(None, 10, store.mark.epoch)]
    await store.close()
