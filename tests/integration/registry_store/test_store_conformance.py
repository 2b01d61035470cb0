"""The one conformance suite of `PlacementStore`: every adapter passes it, the in-memory one too."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable
from copy import deepcopy
from pathlib import Path
from typing import Protocol

import pytest
import pytest_asyncio

from registry_service.core.transactions import (
    Committed,
    Done,
    Evidence,
    FenceNode,
    GenerationIs,
    Hold,
    JoinNode,
    LiftHold,
    ListPlacements,
    MarkDraining,
    NodeClaim,
    NodeJoined,
    NodeOccupied,
    NodeRecord,
    NonceSpent,
    PlacementPage,
    PlacementRead,
    PlacementReleased,
    PlaceUser,
    RaiseGeneration,
    ReadPlacement,
    RecordViolation,
    ReleasePlacement,
    StoreOperation,
    StoreResult,
    StoreView,
    TakeOver,
    TargetRefused,
    TermLost,
    UserHeld,
    UserPlaced,
    UserTakenOver,
    ViolationRecorded,
)
from registry_service.store.etcd import EtcdStore
from registry_service.store.etcd_client import EtcdAccess
from registry_service.store.etcd_keys import Keys
from registry_service.store.etcd_lease import revoke
from registry_service.store.memory import MemoryDisk, MemoryStore
from registry_service.store.port import PlacementStore
from registry_service.store.sqlite import SqliteStore
from steward.model.keys import (
    GENERATION_SHIFT,
    MAX_GENERATION,
    Epoch,
    NodeId,
    NodeIncarnation,
    NodeRev,
    UserKey,
)
from steward.model.placement import Placement
from steward.model.violations import Violation, ViolationKind
from steward.runtime.clock import boot_ms
from steward.testing.etcd import EtcdCluster

ANN = UserKey("acme", "ann")
BOB = UserKey("acme", "bob")
AT_MS = 1_700_000_000_000


def claim(node_id: str = "n1", nonce: str = "a") -> NodeClaim:
    return NodeClaim(
        NodeId(node_id), f"boot-{nonce}", nonce, f"{nonce}.host:4000", "zone-1", 9, "1.2", 77
    )


def at(node_id: str, node_rev: int) -> NodeIncarnation:
    return NodeIncarnation(NodeId(node_id), NodeRev(node_rev))


class Disk(Protocol):
    """What outlives a store. A backup is of the store alone, or of all that is on the disk."""

    def store(self, least_generation: int) -> PlacementStore: ...

    def back_up(self) -> None: ...

    def put_back(self, *, witness: bool = False) -> None: ...

    def remove_witness(self) -> None: ...


class InMemory:
    def __init__(self) -> None:
        self._disk = MemoryDisk(lambda: AT_MS)

    def store(self, least_generation: int) -> PlacementStore:
        return MemoryStore(self._disk, least_generation)

    def back_up(self) -> None:
        self._saved = deepcopy(self._disk)

    def put_back(self, *, witness: bool = False) -> None:
        left = self._disk.witness
        self._disk = deepcopy(self._saved)
        if not witness:
            self._disk.witness = left

    def remove_witness(self) -> None:
        self._disk.witness = None


class InFiles:
    def __init__(self, directory: Path) -> None:
        self._file = directory / "registry.db"
        self._witness = directory / "registry.db.witness"

    def store(self, least_generation: int) -> PlacementStore:
        return SqliteStore(self._file, lambda: AT_MS, least_generation=least_generation)

    def back_up(self) -> None:
        self._saved = self._file.read_bytes(), self._witness.read_bytes()

    def put_back(self, *, witness: bool = False) -> None:
        self._file.write_bytes(self._saved[0])
        if witness:
            self._witness.write_bytes(self._saved[1])

    def remove_witness(self) -> None:
        self._witness.unlink()


class InEtcd:
    """A backup is of all keys of the cluster, as another tool would take it."""

    def __init__(self, etcd: EtcdCluster, cluster: str, directory: Path) -> None:
        self._etcd = etcd
        self._cluster = cluster
        self._home = directory
        self._witness = directory / "registry.etcd.witness"

    def store(self, least_generation: int) -> PlacementStore:
        return EtcdStore(
            EtcdAccess(self._etcd.endpoints),
            self._cluster,
            self._home,
            lambda: AT_MS,
            boot_ms,
            least_generation=least_generation,
        )

    @property
    def _prefix(self) -> str:
        return Keys(self._cluster).prefix.decode()

    def back_up(self) -> None:
        listed = json.loads(self._etcd.control("get", "--prefix", self._prefix, "-w", "json"))
        self._saved = [
            (base64.b64decode(kv["key"]).decode(), base64.b64decode(kv["value"]).decode())
            for kv in listed["kvs"]
        ]
        self._saved_witness = self._witness.read_bytes()

    def put_back(self, *, witness: bool = False) -> None:
        self._etcd.control("del", "--prefix", self._prefix)
        for key, value in self._saved:
            self._etcd.control("put", key, value)
        if witness:
            self._witness.write_bytes(self._saved_witness)

    def remove_witness(self) -> None:
        self._witness.unlink()


class Opener:
    """A store with its disk, so that a test can open it again."""

    def __init__(self, disk: "Disk") -> None:
        self._disk = disk
        self.least_generation = 0
        self.back_up = disk.back_up
        self.put_back = disk.put_back
        self.remove_witness = disk.remove_witness
        self.store = disk.store(0)

    async def open(self) -> StoreView:
        self.store = self._disk.store(self.least_generation)
        return await self.store.open()

    async def close(self) -> None:
        await self.store.close()

    async def reopen(self) -> StoreView:
        await self.close()
        return await self.open()

    async def commit(self, *operations: StoreOperation) -> Committed:
        outcome = await self.store.commit(operations)
        assert isinstance(outcome, Committed)
        return outcome

    async def one(self, operation: StoreOperation) -> StoreResult:
        (result,) = (await self.commit(operation)).results
        return result

    async def place(self, user: UserKey, target: NodeIncarnation) -> Placement:
        result = await self.one(PlaceUser(user, target, "resolve"))
        assert isinstance(result, UserPlaced)
        return result.placement


@pytest.fixture(params=["memory", "sqlite", "etcd", "newer_etcd"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    if request.param == "memory":
        return InMemory()
    if request.param == "sqlite":
        return InFiles(tmp_path)
    name: str = request.getfixturevalue("cluster_name")
    return InEtcd(request.getfixturevalue(request.param), name, tmp_path)


@pytest_asyncio.fixture
async def opener(disk: Disk) -> AsyncIterator[Opener]:
    opened = Opener(disk)
    await opened.open()
    yield opened
    await opened.store.close()


pytestmark = pytest.mark.asyncio


async def test_an_empty_store_has_nothing(opener: Opener) -> None:
    assert await opener.reopen() == StoreView(0, 0)  # type: ignore[arg-type]
    assert await opener.one(ReadPlacement(ANN)) == PlacementRead(None, False)


async def test_a_join_makes_the_node_once_and_its_revision_is_the_incarnation(
    opener: Opener,
) -> None:
    first = await opener.one(JoinNode(claim()))
    assert first == NodeJoined(NodeRecord(claim(), NodeRev(1)))
    assert await opener.one(JoinNode(claim())) == first
    other = await opener.one(JoinNode(claim(nonce="b")))
    assert other == NodeOccupied(NodeRecord(claim(), NodeRev(1)))


async def test_a_placement_has_the_epoch_of_its_revision(opener: Opener) -> None:
    await opener.one(JoinNode(claim()))
    placed = await opener.one(PlaceUser(ANN, at("n1", 1), "resolve"))
    placement = Placement(ANN, Epoch(2), NodeId("n1"), NodeRev(1), "a.host:4000")
    assert placed == UserPlaced(placement, True)
    assert await opener.one(ReadPlacement(ANN)) == PlacementRead(placement, True)


async def test_a_placement_on_a_living_node_is_kept(opener: Opener) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")))
    placement = await opener.place(ANN, at("n1", 1))
    again = await opener.one(PlaceUser(ANN, at("n2", 2), "resolve"))
    assert again == UserPlaced(placement, False)
    # Also when its own node drains, and whatever the target is.
    await opener.one(MarkDraining(at("n1", 1), "announced"))
    assert await opener.one(PlaceUser(ANN, at("gone", 9), "resolve")) == again


async def test_two_users_of_one_batch_get_two_epochs(opener: Opener) -> None:
    committed = await opener.commit(
        JoinNode(claim()),
        PlaceUser(ANN, at("n1", 1), "resolve"),
        PlaceUser(BOB, at("n1", 1), "resolve"),
    )
    placed = [result for result in committed.results if isinstance(result, UserPlaced)]
    assert [result.placement.epoch for result in placed] == [2, 3]
    assert committed.revision == 3


async def test_racers_of_one_batch_get_the_placement_of_the_winner(opener: Opener) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")))
    committed = await opener.commit(
        PlaceUser(ANN, at("n1", 1), "resolve"), PlaceUser(ANN, at("n2", 2), "resolve")
    )
    winner, loser = committed.results
    assert isinstance(winner, UserPlaced) and isinstance(loser, UserPlaced)
    assert (winner.created, loser.created) == (True, False)
    assert winner.placement == loser.placement


async def test_equal_user_ids_of_two_tenants_are_two_users(opener: Opener) -> None:
    await opener.one(JoinNode(claim()))
    ann = await opener.place(ANN, at("n1", 1))
    other = await opener.place(UserKey("other", "ann"), at("n1", 1))
    assert ann.epoch != other.epoch
    assert await opener.one(ReadPlacement(ANN)) == PlacementRead(ann, True)


@pytest.mark.parametrize("target", [at("n1", 9), at("nobody", 1)])
async def test_nobody_is_placed_on_a_node_that_is_not_there(
    opener: Opener, target: NodeIncarnation
) -> None:
    await opener.one(JoinNode(claim()))
    assert await opener.one(PlaceUser(ANN, target, "resolve")) == TargetRefused(False)
    assert await opener.one(ReadPlacement(ANN)) == PlacementRead(None, False)


async def test_nobody_is_placed_on_a_draining_node(opener: Opener) -> None:
    await opener.one(JoinNode(claim()))
    assert await opener.one(MarkDraining(at("n1", 1), "announced")) == Done(True)
    assert await opener.one(MarkDraining(at("n1", 1), "announced")) == Done(False)
    assert await opener.one(MarkDraining(at("n1", 2), "announced")) == Done(False)
    assert await opener.one(PlaceUser(ANN, at("n1", 1), "resolve")) == TargetRefused(True)


async def test_a_fence_is_one_change_and_ends_every_placement_of_the_incarnation(
    opener: Opener,
) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")))
    before = await opener.place(ANN, at("n1", 1))
    await opener.place(BOB, at("n1", 1))
    fence = FenceNode(at("n1", 1), "lost", Evidence.BROKEN_AND_REFUSED, "refused")
    committed = await opener.commit(fence)
    assert (committed.results, committed.revision) == ((Done(True),), 5)
    assert await opener.one(fence) == Done(False)
    assert await opener.one(ReadPlacement(ANN)) == PlacementRead(before, False)
    after = await opener.place(ANN, at("n2", 2))
    assert (after.epoch, after.incarnation) == (6, at("n2", 2))


async def test_a_fence_of_another_incarnation_changes_nothing(opener: Opener) -> None:
    await opener.one(JoinNode(claim()))
    stale = FenceNode(at("n1", 9), "lost", Evidence.LEASE_OVER)
    assert await opener.one(stale) == Done(False)
    assert isinstance(await opener.one(JoinNode(claim())), NodeJoined)


async def test_a_fenced_process_never_joins_again_and_its_name_is_free(opener: Opener) -> None:
    await opener.one(JoinNode(claim()))
    await opener.one(FenceNode(at("n1", 1), "lost", Evidence.PROOF, "exit 137"))
    assert await opener.one(JoinNode(claim())) == NonceSpent(at("n1", 1), "lost")
    again = await opener.one(JoinNode(claim(nonce="b")))
    assert again == NodeJoined(NodeRecord(claim(nonce="b"), NodeRev(3)))


async def test_a_placement_never_counts_for_the_next_incarnation_of_its_node(
    opener: Opener,
) -> None:
    await opener.one(JoinNode(claim()))
    await opener.place(ANN, at("n1", 1))
    await opener.commit(FenceNode(at("n1", 1), "lost", Evidence.PROOF), JoinNode(claim(nonce="b")))
    read = await opener.one(ReadPlacement(ANN))
    assert isinstance(read, PlacementRead) and not read.alive
    placed = await opener.place(ANN, at("n1", 4))
    assert (placed.epoch, placed.node_rev, placed.address) == (5, 4, "b.host:4000")


async def test_a_release_compares_epoch_and_holder(opener: Opener) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")))
    placement = await opener.place(ANN, at("n1", 1))
    refused = PlacementReleased(False, placement)
    assert await opener.one(ReleasePlacement(ANN, Epoch(2), at("n1", 1), "idle")) == refused
    assert await opener.one(ReleasePlacement(ANN, Epoch(3), at("n2", 2), "idle")) == refused
    assert await opener.one(ReadPlacement(ANN)) == PlacementRead(placement, True)
    release = ReleasePlacement(ANN, Epoch(3), at("n1", 1), "idle")
    assert await opener.one(release) == PlacementReleased(True, None)
    assert await opener.one(release) == PlacementReleased(False, None)
    assert (await opener.place(ANN, at("n2", 2))).epoch == 5


async def test_a_late_release_of_an_old_epoch_removes_nothing(opener: Opener) -> None:
    await opener.one(JoinNode(claim()))
    old = await opener.place(ANN, at("n1", 1))
    release = ReleasePlacement(ANN, old.epoch, at("n1", 1), "idle")
    await opener.one(release)
    new = await opener.place(ANN, at("n1", 1))
    assert await opener.one(release) == PlacementReleased(False, new)
    assert await opener.one(ReadPlacement(ANN)) == PlacementRead(new, True)


async def test_a_take_over_moves_the_user_in_one_step(opener: Opener) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")))
    await opener.place(ANN, at("n1", 1))
    move = TakeOver(ANN, Epoch(3), at("n1", 1), at("n2", 2), "drain")
    moved = await opener.one(move)
    placement = Placement(ANN, Epoch(4), NodeId("n2"), NodeRev(2), "b.host:4000")
    assert moved == UserTakenOver(placement)
    assert await opener.one(ReadPlacement(ANN)) == PlacementRead(placement, True)
    # Sent again it changes nothing, and says what is there.
    assert await opener.one(move) == PlacementReleased(False, placement)
    (row,) = await opener.store.ledger(None, 1)
    assert (row.kind, row.cause, row.epoch) == ("takeover", "drain", 4)
    assert row.evidence == "was on n1/1 under 3, which handed it off"


async def test_a_take_over_compares_epoch_and_holder(opener: Opener) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")))
    current = await opener.place(ANN, at("n1", 1))
    for stale in (
        TakeOver(ANN, Epoch(2), at("n1", 1), at("n2", 2), "drain"),
        TakeOver(ANN, Epoch(4), at("n1", 1), at("n2", 2), "drain"),
        TakeOver(ANN, Epoch(3), at("n2", 2), at("n2", 2), "drain"),
        TakeOver(ANN, Epoch(3), at("n1", 9), None, "drain"),
    ):
        assert await opener.one(stale) == PlacementReleased(False, current)
    nobody = TakeOver(BOB, Epoch(3), at("n1", 1), at("n2", 2), "drain")
    assert await opener.one(nobody) == PlacementReleased(False, None)
    assert await opener.one(ReadPlacement(ANN)) == PlacementRead(current, True)


@pytest.mark.parametrize("target", [None, at("n2", 2), at("n3", 3), at("n3", 9), at("no", 1)])
async def test_a_take_over_without_a_node_that_takes_users_is_a_release(
    opener: Opener, target: NodeIncarnation | None
) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")), JoinNode(claim("n3", "c")))
    await opener.place(ANN, at("n1", 1))
    await opener.commit(
        MarkDraining(at("n2", 2), "announced"),
        FenceNode(at("n3", 3), "lost", Evidence.PROOF),
    )
    move = TakeOver(ANN, Epoch(4), at("n1", 1), target, "drain")
    assert await opener.one(move) == PlacementReleased(True, None)
    assert await opener.one(ReadPlacement(ANN)) == PlacementRead(None, False)


async def test_a_draining_or_dead_holder_can_be_taken_over_from(opener: Opener) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")))
    await opener.place(ANN, at("n1", 1))
    await opener.place(BOB, at("n1", 1))
    await opener.one(MarkDraining(at("n1", 1), "announced"))
    move = TakeOver(ANN, Epoch(3), at("n1", 1), at("n2", 2), "drain")
    assert isinstance(await opener.one(move), UserTakenOver)
    await opener.one(FenceNode(at("n1", 1), "stopped", Evidence.PROOF))
    late = TakeOver(BOB, Epoch(4), at("n1", 1), at("n2", 2), "drain")
    assert isinstance(await opener.one(late), UserTakenOver)


async def test_placements_of_an_incarnation_are_listed_in_pages(opener: Opener) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")))
    users = [UserKey(tenant, f"u{n}") for tenant in ("a", "b") for n in range(4)]
    mine = [await opener.place(user, at("n1", 1)) for user in users[::2]]
    for user in users[1::2]:
        await opener.place(user, at("n2", 2))
    first = await opener.one(ListPlacements(at("n1", 1), None, 3))
    assert first == PlacementPage(tuple(mine[:3]), True)
    last = await opener.one(ListPlacements(at("n1", 1), mine[2].user, 3))
    assert last == PlacementPage(tuple(mine[3:]), False)
    assert await opener.one(ListPlacements(at("n1", 1), None, 4)) == PlacementPage(
        tuple(mine), False
    )
    # Also of an incarnation that is over, and none of another one.
    await opener.one(FenceNode(at("n1", 1), "lost", Evidence.PROOF))
    assert await opener.one(ListPlacements(at("n1", 1), None, 1)) == PlacementPage((mine[0],), True)
    assert await opener.one(ListPlacements(at("n1", 7), None, 9)) == PlacementPage((), False)


async def test_a_raised_generation_is_above_every_epoch_before_and_stays(opener: Opener) -> None:
    await opener.one(JoinNode(claim()))
    before = await opener.place(ANN, at("n1", 1))
    assert await opener.one(RaiseGeneration(3, "the log has fence 9")) == GenerationIs(3, True)
    assert await opener.one(RaiseGeneration(3, "again")) == GenerationIs(3, False)
    assert await opener.one(RaiseGeneration(1, "lower")) == GenerationIs(3, False)
    joined = await opener.one(JoinNode(claim(nonce="b")))
    assert isinstance(joined, NodeJoined)
    after = await opener.place(BOB, joined.record.incarnation)
    assert after.epoch == 3 << GENERATION_SHIFT | 6
    assert after.epoch > before.epoch
    view = await opener.reopen()
    assert (view.generation, view.raised) == (3, "")
    # Placements from before are what they were, and count no more.
    assert await opener.one(ReadPlacement(ANN)) == PlacementRead(before, False)
    release = ReleasePlacement(ANN, before.epoch, at("n1", 1), "idle")
    assert await opener.one(release) == PlacementReleased(True, None)
    rows = await opener.store.ledger(None, 9)
    assert [(row.kind, row.cause, row.evidence) for row in rows if row.kind == "generation"] == [
        ("generation", "the log has fence 9", "now 3")
    ]


async def test_a_raised_generation_fences_every_node_in_the_same_step(opener: Opener) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")))
    await opener.place(ANN, at("n1", 1))
    await opener.one(RaiseGeneration(1, "restored"))
    # Its processes can't come back, and its strict users are held, since nobody saw it die.
    cause = "generation raised"
    assert await opener.one(JoinNode(claim())) == NonceSpent(at("n1", 1), cause)
    assert await opener.one(JoinNode(claim("n2", "b"))) == NonceSpent(at("n2", 2), cause)
    joined = await opener.one(JoinNode(claim("n2", "c")))
    assert isinstance(joined, NodeJoined)
    held = await opener.one(PlaceUser(ANN, joined.record.incarnation, "resolve", strict=True))
    assert isinstance(held, UserHeld)
    view = await opener.reopen()
    assert [node.incarnation for node in view.nodes] == [joined.record.incarnation]
    assert view.holds == (Hold(at("n1", 1), 77), Hold(at("n2", 2), 77))
    rows = [row for row in await opener.store.ledger(None, 9) if row.kind == "fence"]
    assert [(row.revision, row.node_id, row.cause, row.evidence) for row in rows] == [
        (6, "n2", cause, "D: every node joins anew"),
        (5, "n1", cause, "D: every node joins anew"),
    ]


async def test_an_incarnation_carries_the_generation_in_which_it_joined(opener: Opener) -> None:
    await opener.one(JoinNode(claim()))
    await opener.one(RaiseGeneration(2, "restored"))
    joined = await opener.one(JoinNode(claim(nonce="b")))
    assert isinstance(joined, NodeJoined)
    assert joined.record.node_rev == 2 << GENERATION_SHIFT | 4
    await opener.one(RaiseGeneration(MAX_GENERATION, "restored"))
    last = await opener.one(JoinNode(claim(nonce="c")))
    assert isinstance(last, NodeJoined)
    assert last.record.node_rev < 1 << 53  # Exact in JSON, wherever it is read.


async def test_a_store_that_was_put_back_is_raised_before_it_is_served(opener: Opener) -> None:
    await opener.one(JoinNode(claim()))
    await opener.close()
    opener.back_up()
    await opener.open()
    lost = await opener.place(ANN, at("n1", 1))
    await opener.close()
    opener.put_back()
    view = await opener.open()
    assert (view.generation, view.nodes) == (1, ())
    assert view.raised.startswith("the store was at revision 2, generation 0, term 2, and is at 1,")
    joined = await opener.one(JoinNode(claim(nonce="b")))
    assert isinstance(joined, NodeJoined)
    assert (await opener.place(ANN, joined.record.incarnation)).epoch > lost.epoch
    # A second time from the same backup: above what the first restore granted.
    await opener.close()
    opener.put_back()
    assert (await opener.open()).generation == 2
    # As it was left, it is as good as its witness, closed or killed.
    view = await opener.reopen()
    assert (view.generation, view.raised) == (2, "")


async def test_a_store_without_a_witness_is_taken_for_restored(opener: Opener) -> None:
    await opener.one(JoinNode(claim()))
    await opener.close()
    opener.remove_witness()
    view = await opener.open()
    if isinstance(opener.store, EtcdStore):
        # Any machine may run its registry, and a new one has none: the log's floor must tell.
        assert (view.generation, view.raised, len(view.nodes)) == (0, "", 1)
        return
    assert (view.generation, view.raised) == (1, "the store has no witness: restored?")


async def test_an_operator_names_the_least_generation_where_the_witness_was_put_back_too(
    opener: Opener,
) -> None:
    await opener.one(JoinNode(claim()))
    await opener.close()
    opener.back_up()
    await opener.open()
    await opener.place(ANN, at("n1", 1))
    await opener.close()
    opener.put_back(witness=True)
    opener.least_generation = 4
    view = await opener.open()
    assert (view.generation, view.nodes) == (4, ())
    assert view.raised == "registry.least_generation is 4"
    # It may stay in the settings: it is done.
    await opener.one(JoinNode(claim(nonce="b")))
    view = await opener.reopen()
    assert (view.generation, len(view.nodes), view.raised) == (4, 1, "")


async def test_strict_users_of_a_held_incarnation_stay_until_the_hold_is_lifted(
    opener: Opener,
) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")))
    strict = await opener.place(ANN, at("n1", 1))
    await opener.place(BOB, at("n1", 1))
    await opener.one(FenceNode(at("n1", 1), "silent", Evidence.MISSED_BEATS, "", hold=True))
    # The hold is in the store: a restart does not end it.
    assert (await opener.reopen()).holds == (Hold(at("n1", 1), 77),)
    held = PlaceUser(ANN, at("n2", 2), "resolve", strict=True)
    assert await opener.one(held) == UserHeld(strict)
    assert await opener.one(ReadPlacement(ANN)) == PlacementRead(strict, False)
    # Users of other tenants are taken over at once, and new ones are placed.
    assert (await opener.place(BOB, at("n2", 2))).node_id == "n2"
    new = PlaceUser(UserKey("acme", "new"), at("n2", 2), "resolve", strict=True)
    assert isinstance(await opener.one(new), UserPlaced)
    assert await opener.one(LiftHold(at("n1", 1))) == Done(True)
    assert await opener.one(LiftHold(at("n1", 1))) == Done(False)
    assert isinstance(await opener.one(held), UserPlaced)
    assert (await opener.reopen()).holds == ()


async def test_a_fence_without_a_hold_holds_nobody(opener: Opener) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")))
    await opener.place(ANN, at("n1", 1))
    await opener.one(FenceNode(at("n1", 1), "lost", Evidence.PROOF))
    placed = await opener.one(PlaceUser(ANN, at("n2", 2), "resolve", strict=True))
    assert isinstance(placed, UserPlaced) and placed.created


async def test_everything_is_there_after_a_restart_and_epochs_grow_on(opener: Opener) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")), JoinNode(claim("n3", "c")))
    ann = await opener.place(ANN, at("n1", 1))
    await opener.place(BOB, at("n3", 3))
    await opener.one(MarkDraining(at("n2", 2), "announced"))
    await opener.one(FenceNode(at("n3", 3), "lost", Evidence.PROOF))
    view = await opener.reopen()
    assert view.revision == 7
    assert view.nodes == (
        NodeRecord(claim(), NodeRev(1)),
        NodeRecord(claim("n2", "b"), NodeRev(2), draining=True),
    )
    assert view.placements == ((at("n1", 1), 1),)
    assert await opener.one(ReadPlacement(ANN)) == PlacementRead(ann, True)
    assert (await opener.place(BOB, at("n1", 1))).epoch == 8
    assert await opener.one(JoinNode(claim("n3", "c"))) == NonceSpent(at("n3", 3), "lost")


async def test_the_ledger_tells_what_happened_with_cause_and_evidence(opener: Opener) -> None:
    await opener.commit(JoinNode(claim()), JoinNode(claim("n2", "b")))
    trace = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
    await opener.one(PlaceUser(ANN, at("n1", 1), "resolve", traceparent=trace))
    await opener.one(FenceNode(at("n1", 1), "lost", Evidence.BROKEN_AND_REFUSED, "refused"))
    await opener.place(ANN, at("n2", 2))
    await opener.one(ReleasePlacement(ANN, Epoch(3), at("n1", 1), "idle"))
    refusal = Violation(ViolationKind.STALE_APPEND, "fence 5", ANN, Epoch(3), at("n1", 1))
    recorded = await opener.one(RecordViolation(refusal, "agent:n1"))
    assert recorded == ViolationRecorded(1)
    await opener.one(MarkDraining(at("n2", 2), "announced"))
    await opener.one(ReleasePlacement(ANN, Epoch(5), at("n2", 2), "idle"))
    rows = (await opener.store.ledger(None, 100))[::-1]
    assert [row.number for row in rows] == list(range(1, 8))
    assert {row.at_ms for row in rows} == {AT_MS}
    assert [row.traceparent for row in rows] == ["", "", trace, "", "", "", ""]
    told = [(row.revision, row.kind, row.cause, row.evidence) for row in rows]
    assert told == [
        (1, "join", "a.host:4000", ""),
        (2, "join", "b.host:4000", ""),
        (3, "place", "resolve", ""),
        (4, "fence", "lost", "B: refused"),
        (5, "takeover", "resolve", "was on n1/1 under 3, which is not alive"),
        (6, "drain", "announced", ""),
        (7, "release", "idle", ""),
    ]
    mine = await opener.store.ledger(ANN, 2)
    assert [row.kind for row in mine] == ["release", "takeover"]
    assert (mine[1].tenant, mine[1].user, mine[1].epoch) == ("acme", "ann", 5)
    assert (mine[1].node_id, mine[1].node_rev) == ("n2", 2)
    assert await opener.store.ledger(BOB, 10) == []


async def test_outcomes_come_in_the_order_of_the_commits(opener: Opener) -> None:
    await opener.one(JoinNode(claim()))
    seen: list[int] = []
    futures = []
    for number in range(5):
        user = UserKey("acme", f"u{number}")
        future = opener.store.commit((PlaceUser(user, at("n1", 1), "resolve"),))
        future.add_done_callback(lambda _, number=number: seen.append(number))
        futures.append(future)
    outcomes = await asyncio.gather(*futures)
    assert seen == [0, 1, 2, 3, 4]
    assert [outcome.revision for outcome in outcomes] == [2, 3, 4, 5, 6]  # type: ignore[union-attr]


async def test_a_store_whose_term_was_raised_writes_nothing_any_more(opener: Opener) -> None:
    await opener.one(JoinNode(claim()))
    await _raise_term(opener)
    lost = await opener.store.commit((PlaceUser(ANN, at("n1", 1), "resolve"),))
    assert lost == TermLost(2)
    assert await opener.store.commit((ReadPlacement(ANN),)) == TermLost(2)
    view = await opener.reopen()
    assert (view.revision, view.placements) == (1, ())


def _raise_term(opener: Opener) -> Awaitable[object]:
    """As another process would that got the store in spite of its lock."""
    store = opener.store
    if isinstance(store, MemoryStore):
        return MemoryStore(store._disk).open()
    if isinstance(store, EtcdStore):
        return _take_from(store)
    assert isinstance(store, SqliteStore)

    def work() -> None:
        store._opened().execute("UPDATE meta SET term = term + 1")

    return store._call(work)


async def _take_from(store: EtcdStore) -> None:
    """Its key goes, as if its lease had ended, and another leads for a moment."""
    tenure, client = store._tenure, store._client
    assert tenure is not None and client is not None
    await tenure.end(give_up=False)
    await revoke(client, tenure.lease, 5)
    home = store._home.path.with_name("another")
    other = EtcdStore(store._access, store._cluster, home, lambda: AT_MS, boot_ms)
    await other.open()
    await other.close()


async def test_closing_twice_is_harmless(opener: Opener) -> None:
    await opener.store.close()
    await opener.store.close()
    assert (await opener.reopen()).revision == 0
