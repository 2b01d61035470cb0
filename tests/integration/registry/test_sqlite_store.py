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
    PlaceUser,
    RaiseGeneration,
    ReadPlacement,
    ReleasePlacement,
    StoreOperation,
    TakeOver,
)
from registry_service.store.memory import MemoryDisk
from registry_service.store.port import StoreFailed
from registry_service.store.reading import read_ledger
from registry_service.store.sqlite import SqliteStore
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
@given(st.lists(st.lists(operations, max_size=6), max_size=12))
def test_sqlite_answers_like_the_plain_rules_in_memory(
    batches: list[list[StoreOperation]],
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
            results = tuple(tables.apply(operation) for operation in batch)
            revision = tables.finish()
            assert Committed(results, revision) == disk.apply(term, tuple(batch))
        assert read_ledger(db, None, 1_000) == disk.rows[::-1]
        assert tables.start()[1] == disk.open()[1]
    finally:
        db.close()
