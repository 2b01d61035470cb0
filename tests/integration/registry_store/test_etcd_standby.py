"""Several registries on one etcd: one leads, the others are ready, and none writes past another."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from registry_service.core.transactions import (
    Evidence,
    FenceNode,
    LiftHold,
    MarkDraining,
    PlaceUser,
    RecordViolation,
    ReleasePlacement,
    StoreView,
    TakeOver,
    TermLost,
)
from registry_service.store.etcd import EtcdStore
from registry_service.store.etcd_client import (
    RANGE,
    TXN,
    EtcdAccess,
    EtcdClient,
    EtcdCompacted,
    prefix_end,
    put,
)
from registry_service.store.etcd_keys import Keys
from registry_service.store.etcd_lease import revoke
from registry_service.store.etcd_standby import LEADER_TTL_S, Follower
from registry_service.store.etcd_watch import DEAD_S, PAGE, follow
from registry_service.store.etcdpb import steward_etcd_pb2 as pb
from registry_service.store.port import LeadershipOver, StoreFailed
from registry_service.store.violation_table import ViolationTotals
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.model.violations import Violation, ViolationKind
from steward.runtime.service import EnvironmentUnusable
from steward.testing.etcd import EtcdCluster
from steward.testing.etcd_life import SHORT_LEASE_S, committed, join, place, read, store_on
from steward.testing.proxy import CutProxy
from steward.testing.waiting import eventually

pytestmark = pytest.mark.asyncio

ANN, BOB = UserKey("acme", "ann"), UserKey("acme", "bob")
Make = Callable[..., EtcdStore]


@pytest_asyncio.fixture
async def make(etcd: EtcdCluster, cluster_name: str, tmp_path: Path) -> AsyncIterator[Make]:
    """Makes stores of one cluster, each with a home of the name that is given."""
    made: list[EtcdStore] = []

    def one(home: str, endpoints: tuple[str, ...] = (), lease_s: int = LEADER_TTL_S) -> EtcdStore:
        where = endpoints or etcd.endpoints
        made.append(store_on(where, cluster_name, tmp_path / home, lease_s=lease_s))
        return made[-1]

    yield one
    for each in made:
        await each.close()


@pytest_asyncio.fixture
async def client(etcd: EtcdCluster) -> AsyncIterator[EtcdClient]:
    opened = EtcdClient(EtcdAccess(etcd.endpoints))
    yield opened
    await opened.close()


def tear_down(store: EtcdStore) -> None:
    """As if its process had been killed: nobody renews, nobody says goodbye."""
    assert store._tenure is not None and store._upkeep is not None
    store._tenure._renewing.cancel()
    store._upkeep.cancel()
    store._home.leave()


async def test_a_second_registry_waits_and_takes_over_all_that_was_done_meanwhile(
    make: Make,
) -> None:
    first, second = make("a"), make("b")
    await first.open()
    opening = asyncio.create_task(second.open())
    node = await join(first)
    ann = await place(first, ANN, node)
    done, _ = await asyncio.wait({opening}, timeout=1.0)
    assert not done
    # What it follows is also what came after it began.
    bob = await place(first, BOB, node)
    refusal = Violation(ViolationKind.STALE_APPEND, "fence 5")
    await committed(first, RecordViolation(refusal, "agent:n1"))
    mark = first.mark
    loop = asyncio.get_running_loop()
    began = loop.time()
    await first.close()
    view = await asyncio.wait_for(opening, 5)
    assert loop.time() - began < LEADER_TTL_S / 2
    assert view == StoreView(0, mark.revision, view.nodes, ((node, 2),))
    assert [each.incarnation for each in view.nodes] == [node]
    assert (await read(second, ANN)).placement == ann
    assert (await read(second, BOB)).placement == bob
    assert second.mark == mark
    assert (await place(second, UserKey("acme", "new"), node)).epoch > bob.epoch


async def test_a_registry_that_was_killed_is_followed_when_its_lease_is_over(make: Make) -> None:
    first, second = make("a", lease_s=SHORT_LEASE_S), make("b")
    await first.open()
    node = await join(first)
    opening = asyncio.create_task(second.open())
    tear_down(first)
    view = await asyncio.wait_for(opening, SHORT_LEASE_S + 3)
    assert [each.incarnation for each in view.nodes] == [node]


async def test_a_process_in_the_same_directory_need_not_wait_for_the_lease_of_the_dead_one(
    make: Make,
) -> None:
    first = make("a")
    await first.open()
    tear_down(first)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await make("a").open()
    assert loop.time() - began < LEADER_TTL_S / 2


async def test_a_process_in_a_copy_of_the_directory_of_the_leader_takes_nothing_from_it(
    make: Make, tmp_path: Path
) -> None:
    first = make("a")
    await first.open()
    node = await join(first)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    opening = asyncio.create_task(make("b").open())
    done, _ = await asyncio.wait({opening}, timeout=1.0)
    assert not done
    await place(first, ANN, node)
    await first.close()
    view = await asyncio.wait_for(opening, LEADER_TTL_S)
    assert view.placements == ((node, 1),)


async def test_two_processes_can_not_use_one_directory(make: Make) -> None:
    await make("a").open()
    with pytest.raises(EnvironmentUnusable, match="another registry process uses it"):
        await make("a").open()


async def test_a_leader_that_was_cut_off_writes_nothing_after_its_successor_began(
    make: Make, etcd: EtcdCluster
) -> None:
    async with CutProxy(etcd.endpoints[0]) as proxy:
        first, second = make("a", (proxy.address,), SHORT_LEASE_S), make("b")
        await first.open()
        node = await join(first)
        proxy.cut()
        # It was decided while this process led, and is on its way when it does so no more.
        late = first.commit((PlaceUser(ANN, node, "resolve"),))
        await asyncio.wait_for(second.open(), LEADER_TTL_S * 2)
        with pytest.raises(StoreFailed):
            await late
        proxy.mend()
        with pytest.raises(StoreFailed):
            await first.commit((PlaceUser(ANN, node, "resolve"),))
        assert (await read(second, ANN)).placement is None
        before = second.mark
        await asyncio.sleep(0.5)
        assert (await read(second, ANN)).placement is None
        assert second.mark == before


async def test_a_leader_whose_key_is_gone_learns_who_leads_with_its_next_transaction(
    make: Make, client: EtcdClient
) -> None:
    first, second = make("a"), make("b")
    await first.open()
    node = await join(first)
    assert first._tenure is not None
    await first._tenure.end(give_up=False)
    await revoke(client, first._tenure.lease, 5)
    await second.open()
    assert await first.commit((PlaceUser(ANN, node, "resolve"),)) == TermLost(2)
    assert (await read(second, ANN)).placement is None


async def test_a_leader_whose_key_is_gone_ends_also_when_it_has_nothing_to_write(
    make: Make, etcd: EtcdCluster
) -> None:
    first, second = make("a"), make("b")
    await first.open()
    clock = first.guarded(lambda: 7)
    etcd.control("del", first._keys.leader.decode())
    await second.open()
    async with asyncio.timeout(LEADER_TTL_S / 2):
        with pytest.raises(LeadershipOver):
            while clock() == 7:
                await asyncio.sleep(0.05)
    with pytest.raises(StoreFailed, match="key is not its own"):
        await first.commit((MarkDraining(NodeIncarnation(NodeId("n1"), NodeRev(1)), "drain"),))


async def test_the_clock_of_a_leader_stops_with_its_tenure(
    etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    now = 1_000_000
    store = store_on(etcd.endpoints, cluster_name, tmp_path, clock=lambda: now)
    await store.open()
    clock = store.guarded(lambda: 7)
    assert clock() == 7
    # It stood still, and nothing of it has run since: no renewal, and no notice of its end.
    now += LEADER_TTL_S * 1_000
    with pytest.raises(LeadershipOver):
        clock()
    await store.close()
    with pytest.raises(LeadershipOver):
        clock()


async def test_a_key_that_something_else_changed_stops_the_registry(
    make: Make, etcd: EtcdCluster
) -> None:
    store = make("a")
    await store.open()
    node = await join(store)
    placed = await place(store, ANN, node)
    key = store._keys.placement(ANN).decode()
    etcd.control("del", key)
    with pytest.raises(StoreFailed, match="no registry"):
        await read(store, ANN)
    # The next one reads what is there.
    await store.close()
    again = make("a")
    await again.open()
    assert (await read(again, ANN)).placement is None
    assert (await place(again, ANN, node)).epoch > placed.epoch


async def test_what_is_more_than_a_transaction_takes_is_nested(make: Make) -> None:
    store = make("a")
    await store.open()
    node = await join(store)
    refusal = Violation(ViolationKind.STALE_APPEND, "fence 5")
    places = tuple(
        PlaceUser(UserKey("acme", f"user-{number}"), node, "resolve") for number in range(150)
    )
    records = (RecordViolation(refusal, "agent:n1"),) * 400
    results = (await committed(store, *places, *records)).results
    assert len(results) == 550
    assert [row.number for row in await store.violations(0, 1_000)] == list(range(1, 401))
    assert store.mark.ledger == 151


async def test_a_ledger_keeps_its_newest_rows(
    etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    store = store_on(etcd.endpoints, cluster_name, tmp_path, keep_rows=300)
    await store.open()
    node = await join(store)
    for start in range(0, 1_500, 100):
        users = [UserKey("acme", f"user-{number}") for number in range(start, start + 100)]
        await committed(store, *(PlaceUser(user, node, "resolve") for user in users))
    rows = await store.ledger(None, 10_000)
    assert rows[0].number == 1_501
    assert 300 <= len(rows) < 1_501
    assert [row.number for row in reversed(rows)] == list(range(rows[-1].number, 1_502))
    assert len(await store.ledger_after(1_400, 1_000)) == 101
    await store.close()


async def test_the_oldest_refusals_go_first_and_breaches_when_there_is_nothing_else(
    etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    refusal = RecordViolation(Violation(ViolationKind.STALE_APPEND, "fence 5"), "agent:n1")
    breach = RecordViolation(Violation(ViolationKind.FOREIGN_EVENT, "of bob"), "edge:e1")

    async def opened() -> EtcdStore:
        store = store_on(etcd.endpoints, cluster_name, tmp_path, keep_violations=4)
        await store.open()
        return store

    store = await opened()
    await committed(store, breach, refusal, refusal, breach)
    await store.close()
    store = await opened()
    await committed(store, refusal)
    assert [row.number for row in await store.violations(0, 10)] == [1, 3, 4, 5]
    await committed(store, breach, breach, breach)
    assert [row.number for row in await store.violations(0, 10)] == [4, 6, 7, 8]
    assert [row.number for row in await store.violations(0, 2, newest=True)] == [7, 8]
    assert await store.violation_totals() == ViolationTotals(3, 5)
    await store.close()


async def test_a_follower_goes_on_when_what_it_would_read_is_compacted(
    make: Make, etcd: EtcdCluster, cluster_name: str
) -> None:
    store = make("a")
    await store.open()
    node = await join(store)
    gone = await place(store, ANN, node)
    keys = Keys(cluster_name)
    async with CutProxy(etcd.endpoints[0]) as proxy:
        following = EtcdClient(EtcdAccess((proxy.address,)))
        follower = Follower(following, keys)
        task = asyncio.create_task(follower.run())
        await eventually(lambda: ANN in follower.state.placements, "it follows")
        proxy.cut()
        await proxy.break_off()
        # A user goes and another comes while it is away, and the history of that is dropped.
        await _release(store, gone.epoch, node)
        await place(store, BOB, node)
        status = etcd.control("get", keys.head.decode(), "-w", "json")
        etcd.control("compact", str(_revision(status)))
        proxy.mend()
        await eventually(lambda: BOB in follower.state.placements, "it has listed anew")
        assert ANN not in follower.state.placements
        # And follows from there.
        await place(store, ANN, node)
        await eventually(lambda: ANN in follower.state.placements, "it follows again")
        assert follower.state.whole
        task.cancel()
        await asyncio.wait({task})
        await following.close()


async def test_a_follower_resumes_without_listing_when_its_stream_breaks(
    make: Make, etcd: EtcdCluster, cluster_name: str
) -> None:
    store = make("a")
    await store.open()
    node = await join(store)
    async with CutProxy(etcd.endpoints[0]) as proxy:
        following = EtcdClient(EtcdAccess((proxy.address,)))
        follower = Follower(following, Keys(cluster_name))
        task = asyncio.create_task(follower.run())
        await eventually(lambda: follower.revision, "it follows")
        first = follower.state
        for number in range(5):
            user = UserKey("acme", f"user-{number}")
            await proxy.break_off()
            await place(store, user, node)
            await eventually(lambda user=user: user in first.placements, "it has resumed")  # type: ignore[misc]
        # Silence for longer than a stream may be silent, and then one that says nothing at all.
        proxy.cut()
        await place(store, ANN, node)
        await asyncio.sleep(DEAD_S + 0.5)
        proxy.mend()
        await eventually(lambda: ANN in first.placements, "it has resumed after silence")
        assert follower.state is first and first.whole
        task.cancel()
        await asyncio.wait({task})
        await following.close()


async def test_changes_of_a_long_absence_end_where_they_end(
    client: EtcdClient, cluster_name: str
) -> None:
    """A server gives them in parts of 1,000 revisions, each with its own revision of now."""
    keys = Keys(cluster_name)
    start, end = keys.placements, prefix_end(keys.placements)

    async def change(number: int) -> int:
        request = pb.TxnRequest(success=[put(start + b"%d" % (number % 50), b"%d" % number)])
        return int((await client.call(TXN, request, within_s=5)).header.revision)

    first = await change(0)
    newest = 0
    for some in range(15):
        newest = max(await asyncio.gather(*(change(some * 100 + n) for n in range(100))))
    after = first
    while after < newest:
        # The stream breaks after each part.
        changes = follow(client, start, end, after)
        async with asyncio.timeout(10):
            part = await anext(changes)
        await changes.aclose()
        assert part.events[0].kv.mod_revision == after + 1
        assert part.revision == part.events[-1].kv.mod_revision
        after = part.revision


async def test_a_follower_lists_anew_when_etcd_is_older_than_what_it_has_seen(
    client: EtcdClient, cluster_name: str
) -> None:
    keys = Keys(cluster_name)
    request = pb.TxnRequest(success=[put(keys.head, b"{}")])
    now = (await client.call(TXN, request, within_s=5)).header.revision
    with pytest.raises(EtcdCompacted, match="before what was seen"):
        async with asyncio.timeout(10):
            await anext(follow(client, keys.prefix, prefix_end(keys.prefix), now + 1_000))


async def test_a_store_that_is_restored_under_its_leader_stops_it(
    make: Make, client: EtcdClient
) -> None:
    store = make("a")
    await store.open()
    node = await join(store)
    await place(store, ANN, node)
    # The backup is of this tenure, so that leader and lease are in it.
    request = pb.RangeRequest(key=store._keys.head)
    head = (await client.call(RANGE, request, within_s=5)).kvs[0].value
    for name in ("ben", "bob", "cem"):
        await place(store, UserKey("acme", name), node)
    await client.call(TXN, pb.TxnRequest(success=[put(store._keys.head, head)]), within_s=5)
    with pytest.raises(StoreFailed, match="restored"):
        async with asyncio.timeout(LEADER_TTL_S):
            await store.commit((PlaceUser(UserKey("acme", "dan"), node, "resolve"),))


async def test_a_follower_has_what_the_leader_has(
    make: Make, client: EtcdClient, cluster_name: str
) -> None:
    store = make("a")
    await store.open()
    follower = Follower(client, Keys(cluster_name))
    task = asyncio.create_task(follower.run())
    await eventually(lambda: follower.revision, "it follows")
    first, second = await join(store), await join(store, "n2", "b")
    third = await join(store, "n3", "c")
    users = [UserKey("acme", f"user-{number}") for number in range(6)]
    placed = [await place(store, user, first) for user in users]
    refusal = Violation(ViolationKind.STALE_APPEND, "fence 5")
    await committed(
        store,
        ReleasePlacement(users[0], placed[0].epoch, first, "idle"),
        TakeOver(users[1], placed[1].epoch, first, second, "move"),
        MarkDraining(second, "announced"),
        FenceNode(third, "silent", Evidence.MISSED_BEATS, hold=True),
        RecordViolation(refusal, "agent:n1"),
    )
    await committed(store, FenceNode(first, "lost", Evidence.PROOF, hold=True))
    await committed(store, LiftHold(third))
    mine = store._state
    await eventually(lambda: follower.state.written == mine.written, "it has all")
    theirs = follower.state
    assert theirs.view("") == mine.view("")
    assert theirs.placements == mine.placements and len(mine.placements) == 5
    assert theirs.leases == mine.leases
    assert theirs.kept.numbers == mine.kept.numbers
    assert theirs.whole
    task.cancel()
    await asyncio.wait({task})


async def test_a_watch_gives_each_change_once_and_in_order_over_streams_that_break(
    etcd: EtcdCluster, client: EtcdClient
) -> None:
    start = (await client.call(RANGE, pb.RangeRequest(key=b"w"), within_s=5)).header.revision
    seen: list[tuple[bytes, int]] = []
    async with CutProxy(etcd.endpoints[0]) as proxy:
        following = EtcdClient(EtcdAccess((proxy.address,)))

        async def watch() -> None:
            async for changes in follow(following, b"w", b"x", start):
                assert changes.events[-1].kv.mod_revision <= changes.revision
                seen.extend((each.kv.value, each.kv.mod_revision) for each in changes.events)

        task = asyncio.create_task(watch())
        for number in range(10):
            request = pb.TxnRequest(success=[put(b"w", b"%d" % number)])
            await client.call(TXN, request, within_s=5)
            if number % 3 == 2:
                await eventually(lambda number=number: len(seen) > number, "it is told")  # type: ignore[misc]
                await proxy.break_off()
        await eventually(lambda: len(seen) >= 10, "all is told")
        task.cancel()
        await asyncio.wait({task})
        await following.close()
    assert [value for value, _ in seen] == [b"%d" % number for number in range(10)]
    revisions = [revision for _, revision in seen]
    assert revisions == sorted(set(revisions))


async def test_more_placements_than_a_page_are_listed_as_of_one_revision(make: Make) -> None:
    store = make("a")
    await store.open()
    node = await join(store)
    users = [UserKey("acme", f"user-{number}") for number in range(PAGE + 500)]
    for start in range(0, len(users), 500):
        some = users[start : start + 500]
        await committed(store, *(PlaceUser(user, node, "resolve") for user in some))
    await store.close()
    again = make("b")
    assert (await again.open()).placements == ((node, len(users)),)
    assert len(await again.placements(None, 10_000, again.mark.epoch)) == len(users)


async def _release(store: EtcdStore, epoch: Epoch, node: NodeIncarnation) -> None:
    await committed(store, ReleasePlacement(ANN, epoch, node, "idle"))


def _revision(listed: str) -> int:
    return int(json.loads(listed)["header"]["revision"])
