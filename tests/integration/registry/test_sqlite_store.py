"""What only the SQLite store has: a lock, a file, and an engine that can fail."""

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry_service.core.transactions import (
    Committed,
    Evidence,
    FenceNode,
    JoinNode,
    LiftHold,
    ListPlacements,
    MarkDraining,
    NodeClaim,
    NodeJoined,
    PlacementRead,
    PlacementReleased,
    PlaceUser,
    RaiseGeneration,
    ReadPlacement,
    ReleasePlacement,
    StoreOperation,
    StoreResult,
    TakeOver,
    UserPlaced,
)
from registry_service.store.ledger_table import ROWS, read_ledger
from registry_service.store.memory import MemoryDisk
from registry_service.store.port import StoreFailed
from registry_service.store.sqlite import SqliteStore
from registry_service.store.statements import insert_rows
from registry_service.store.tables import Tables
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.runtime.service import EnvironmentUnusable


def at_zero() -> int:
    return 0


JOIN = JoinNode(NodeClaim(NodeId("n1"), "boot", "a", "h:1"))


@pytest.mark.asyncio
async def test_a_second_opener_is_refused_by_the_lock(tmp_path: Path) -> None:
    first = SqliteStore(tmp_path / "registry.db", at_zero)
    await first.open()
    second = SqliteStore(tmp_path / "registry.db", at_zero)
    with pytest.raises(EnvironmentUnusable, match="another registry process uses it"):
        await second.open()
    await second.close()
    assert isinstance(await first.commit((JOIN,)), Committed)
    await first.close()
    third = SqliteStore(tmp_path / "registry.db", at_zero)
    assert (await third.open()).revision == 1
    await third.close()


@pytest.mark.asyncio
async def test_a_file_that_is_no_database_is_a_clear_refusal(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    path.write_bytes(b"not a database, " * 64)
    store = SqliteStore(path, at_zero)
    with pytest.raises(EnvironmentUnusable, match="not a database"):
        await store.open()
    await store.close()


@pytest.mark.asyncio
async def test_an_engine_that_fails_fails_the_commit_for_good(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "registry.db", at_zero)
    await store.open()
    await store._call(lambda: store._opened().execute("DROP TABLE ledger"))
    with pytest.raises(StoreFailed, match="no such table: ledger"):
        await store.commit((JOIN,))
    await store._call(lambda: store._opened().execute("SELECT 1"))
    await store.close()
    with sqlite3.connect(tmp_path / "registry.db") as db:
        # All or nothing: the node of the failed batch is not there.
        assert db.execute("SELECT count(*) FROM node").fetchone() == (0,)
    db.close()


@pytest.mark.asyncio
async def test_a_commit_after_closing_fails(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "registry.db", at_zero)
    await store.open()
    await store.close()
    with pytest.raises(StoreFailed, match="closed"):
        await store.commit((JOIN,))


nodes = st.sampled_from([NodeId("n1"), NodeId("n2")])
users = st.sampled_from([UserKey("t", "ann"), UserKey("t", "bob"), UserKey("u", "ann")])
small = st.integers(1, 12)
incarnations = st.builds(NodeIncarnation, nodes, st.builds(NodeRev, small))
operations = st.one_of(
    st.builds(
        JoinNode,
        st.builds(NodeClaim, nodes, st.just("b"), st.sampled_from("abc"), st.just("h:1")),
    ),
    st.builds(
        FenceNode,
        incarnations,
        st.just("lost"),
        st.sampled_from(Evidence),
        st.just(""),
        st.booleans(),
    ),
    st.builds(LiftHold, incarnations),
    st.builds(MarkDraining, incarnations, st.just("announced")),
    st.builds(PlaceUser, users, incarnations, st.just("resolve"), st.booleans()),
    st.builds(
        TakeOver,
        users,
        st.builds(Epoch, small),
        incarnations,
        st.none() | incarnations,
        st.just("handoff"),
    ),
    st.builds(ListPlacements, incarnations, st.none() | users, st.integers(1, 2)),
    st.builds(RaiseGeneration, st.integers(0, 2), st.just("restored")),
    st.builds(ReleasePlacement, users, st.builds(Epoch, small), incarnations, st.just("idle")),
    st.builds(ReadPlacement, users),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(operations, max_size=6), max_size=12), st.booleans())
def test_sqlite_answers_like_the_plain_rules_in_memory(
    batches: list[list[StoreOperation]], ahead: bool
) -> None:
    disk = MemoryDisk(at_zero)
    term, _ = disk.open()
    db = sqlite3.connect(":memory:", isolation_level=None)
    try:
        tables = Tables(db, at_zero)
        tables.create()
        tables.start()
        for batch in batches:
            tables.begin()
            if ahead:
                tables.expect(batch)
            results = tuple(tables.apply(operation) for operation in batch)
            revision = tables.finish()
            assert Committed(results, revision) == disk.apply(term, tuple(batch))
        assert read_ledger(db, None, 1_000) == disk.rows[::-1]
        for user in (UserKey("t", "ann"), UserKey("t", "bob"), UserKey("u", "ann")):
            of_user = [row for row in disk.rows[::-1] if (row.tenant, row.user) == user]
            assert read_ledger(db, user, 1_000) == of_user
            assert read_ledger(db, user, 2) == of_user[:2]
        assert tables.start()[1] == disk.open()[1]
    finally:
        db.close()


@pytest.mark.parametrize("count", [0, 1, 31, 300, 512, 515])
def test_rows_are_inserted_in_their_order_however_many(count: int) -> None:
    db = sqlite3.connect(":memory:", isolation_level=None)
    try:
        db.execute("CREATE TABLE t (number INTEGER PRIMARY KEY, name TEXT, half INTEGER)")
        rows = [(f"row {number}", number // 2) for number in range(count)]
        insert_rows(db, "INSERT INTO t (name, half)", 2, rows)
        assert db.execute("SELECT name, half FROM t ORDER BY number").fetchall() == rows
    finally:
        db.close()


@pytest.mark.asyncio
async def test_a_large_batch_places_moves_and_releases_as_one_by_one(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "registry.db", at_zero)
    view = await store.open()
    (node,) = await _committed(store, JOIN)
    assert isinstance(node, NodeJoined)
    target = node.record.incarnation
    users = [UserKey("t", f"\u00fc {number} \"'\\") for number in range(view.most_operations)]
    placed = await _committed(store, *(PlaceUser(user, target, "resolve") for user in users))
    epochs = [result.placement.epoch for result in placed if isinstance(result, UserPlaced)]
    assert epochs == list(range(2, 2 + len(users)))
    released = await _committed(
        store,
        *(
            ReleasePlacement(user, Epoch(epoch), target, "idle")
            for user, epoch in zip(users[::2], epochs[::2], strict=True)
        ),
    )
    assert {result.deleted for result in released if isinstance(result, PlacementReleased)} == {
        True
    }
    there = await _committed(store, *map(ReadPlacement, users))
    assert [isinstance(result, PlacementRead) and result.alive for result in there] == [
        False,
        True,
    ] * (len(users) // 2)
    await store.close()


async def _place_in_turn(store: SqliteStore, times: int, users: int) -> None:
    """Place and release one of `users` users after the other, so many times."""
    (node,) = await _committed(store, JOIN)
    assert isinstance(node, NodeJoined)
    target = node.record.incarnation
    for turn in range(times):
        user = UserKey("t", str(turn % users))
        (placed,) = await _committed(store, PlaceUser(user, target, "resolve"))
        assert isinstance(placed, UserPlaced)
        epoch = placed.placement.epoch
        await _committed(store, ReleasePlacement(user, epoch, target, f"idle {turn}"))


@pytest.mark.asyncio
async def test_a_user_s_rows_are_found_across_parts_and_restarts(tmp_path: Path) -> None:
    users, rounds = 5, ROWS // 2 + 3
    for _ in range(2):
        store = SqliteStore(tmp_path / "registry.db", at_zero)
        await store.open()
        await _place_in_turn(store, rounds, users)
        rows = await store.ledger(None, 10_000)
        assert [row.number for row in rows] == list(range(len(rows), 0, -1))
        for number in range(users):
            of_user = await store.ledger(UserKey("t", str(number)), 10_000)
            assert of_user == [row for row in rows if row.user == str(number)]
            assert await store.ledger(UserKey("t", str(number)), 3) == of_user[:3]
        assert await store.ledger(UserKey("t", ""), 10) == []
        assert await store.ledger(UserKey("t", "nobody"), 10) == []
        await store.close()
    assert len(rows) > 2 * ROWS


@pytest.mark.asyncio
async def test_rows_of_a_version_with_an_index_by_user_are_marked_at_the_start(
    tmp_path: Path,
) -> None:
    store = SqliteStore(tmp_path / "registry.db", at_zero)
    await store.open()
    await _place_in_turn(store, ROWS // 2 + 1, 3)
    expected = await store.ledger(UserKey("t", "1"), 10_000)
    await store.close()
    for before in ("DELETE FROM ledger_part", "DELETE FROM ledger_part WHERE part > 0"):
        with sqlite3.connect(tmp_path / "registry.db") as db:
            db.execute(before)
            db.execute("CREATE INDEX ledger_user ON ledger (tenant, user, number)")
        db.close()
        store = SqliteStore(tmp_path / "registry.db", at_zero)
        await store.open()
        assert await store.ledger(UserKey("t", "1"), 10_000) == expected
        await store.close()
    with sqlite3.connect(tmp_path / "registry.db") as db:
        assert not db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'ledger_user'").fetchall()
    db.close()


@pytest.mark.asyncio
async def test_a_bug_in_the_store_is_told_to_who_waits(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "registry.db", at_zero)
    await store.open()
    with pytest.raises(ZeroDivisionError):
        await store._call(lambda: 1 // 0)
    await store.close()


async def _committed(store: SqliteStore, *operations: StoreOperation) -> tuple[StoreResult, ...]:
    outcome = await store.commit(operations)
    assert isinstance(outcome, Committed)
    return outcome.results
