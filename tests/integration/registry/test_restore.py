"""A registry whose database was put back from a backup, and the file that shows it."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from registry_service.core.transactions import (
    Committed,
    JoinNode,
    NodeClaim,
    PlaceUser,
    StoreView,
    UserPlaced,
)
from registry_service.store.sqlite import SqliteStore
from registry_service.store.witness import Witness, WitnessFile, needed_generation
from steward.model.keys import GENERATION_SHIFT, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.runtime.service import EnvironmentUnusable

pytestmark = pytest.mark.asyncio

JOIN = JoinNode(NodeClaim(NodeId("n1"), "boot", "a", "h:1"))
WORDS = b'{"instance": "x", "term": "1", "generation": null, "revision": 1.5}'
N1 = NodeIncarnation(NodeId("n1"), NodeRev(1))


def store_in(directory: Path, least_generation: int = 0) -> SqliteStore:
    return SqliteStore(directory / "registry.db", lambda: 0, least_generation=least_generation)


async def filled(directory: Path) -> None:
    """A store of three revisions that was closed."""
    store = store_in(directory)
    await store.open()
    placed = [PlaceUser(UserKey("t", name), N1, "resolve") for name in ("ann", "bob")]
    outcome = await store.commit((JOIN, *placed))
    assert isinstance(outcome, Committed)
    assert isinstance(outcome.results[2], UserPlaced)
    await store.close()


async def opened(directory: Path, least_generation: int = 0) -> StoreView:
    store = store_in(directory, least_generation)
    try:
        return await store.open()
    finally:
        await store.close()


async def test_the_witness_is_as_far_as_the_store_after_each_transaction(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    await store.open()
    await store.commit((JOIN,))
    # Read as another process would find it if this one were killed now.
    seen = WitnessFile(tmp_path / "registry.db.witness").read()
    assert seen is not None
    assert (seen.term, seen.generation, seen.revision) == (1, 0, 1)
    await store.close()


async def test_a_store_that_is_ahead_of_its_witness_was_only_killed(tmp_path: Path) -> None:
    await filled(tmp_path)
    (tmp_path / "registry.db.witness").rename(tmp_path / "old")
    witness = WitnessFile(tmp_path / "old").read()
    assert witness is not None
    file = WitnessFile(tmp_path / "registry.db.witness")
    file.start(Witness(witness.instance, 1, 0, 2))
    file.close()
    view = await opened(tmp_path)
    assert (view.generation, view.raised, len(view.nodes)) == (0, "", 1)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"instance": 1', b"\0" * 256, b"[]", WORDS])
async def test_a_witness_that_can_t_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    await filled(tmp_path)
    (tmp_path / "registry.db.witness").write_bytes(content)
    view = await opened(tmp_path)
    assert (view.generation, view.raised) == (1, "the store has no witness: restored?")
    # And it has one again.
    assert (await opened(tmp_path)).raised == ""


async def test_another_store_in_its_place_is_noticed_though_it_is_further(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    await filled(here)
    await filled(there)
    await opened(there)
    shutil.copy(there / "registry.db", here / "registry.db")
    view = await opened(here)
    assert (view.generation, view.raised) == (1, "the witness is of another store: replaced?")


async def test_a_new_store_beside_an_old_witness_begins_above_it(tmp_path: Path) -> None:
    await filled(tmp_path)
    (tmp_path / "registry.db").unlink()
    assert (await opened(tmp_path)).generation == 1


async def test_when_no_generation_is_left_the_store_is_not_served(tmp_path: Path) -> None:
    await filled(tmp_path)
    assert (await opened(tmp_path, least_generation=31)).generation == 31
    (tmp_path / "registry.db.witness").unlink()
    with pytest.raises(EnvironmentUnusable, match=r"generation 32 is not in 0\.\.31"):
        await opened(tmp_path)
    with pytest.raises(EnvironmentUnusable, match=r"generation 40 is not in 0\.\.31"):
        await opened(tmp_path, least_generation=40)


async def test_each_number_of_the_witness_shows_a_store_that_went_back() -> None:
    witness = Witness("x", 5, 2, 100)
    assert needed_generation(Witness("x", 5, 2, 100), witness, 0) == (2, "")
    assert needed_generation(Witness("x", 6, 3, 101), witness, 3) == (3, "")
    for older in (
        Witness("x", 4, 2, 100),
        Witness("x", 5, 1, 200),
        Witness("x", 5, 2, 99),
    ):
        generation, why = needed_generation(older, witness, 0)
        assert generation == 3
        assert "restored" in why
    assert needed_generation(Witness("x", 4, 2, 100), witness, 9)[0] == 9
    assert needed_generation(Witness("y", 0, 0, 0), witness, 0)[0] == 3
    assert needed_generation(Witness("y", 0, 0, 0), None, 0) == (0, "")


async def test_after_a_restore_every_living_node_comes_again_as_a_new_incarnation(
    clients: Any, registry: Any
) -> None:
    known, edge = clients.node("n1"), clients.edge("e1")
    await known.join()
    assert registry.stop() == 0
    backup = registry.data.parent / "backup.db"
    shutil.copy(registry.data / "registry.db", backup)
    await known.stop_beating()
    await asyncio.to_thread(registry.start)
    # What the backup does not know: a node, and users who were placed.
    await known.join()
    unknown = clients.node("n2")
    await unknown.join()
    await edge.connect()
    before = await edge.resolve(*(f"u{number}" for number in range(12)))
    assert {result.placement.node_id for result in before} == {"n1", "n2"}
    registry.kill()
    await asyncio.gather(known.open.end(), unknown.open.end(), edge.open.end())
    (registry.data / "registry.db-wal").unlink(missing_ok=True)
    shutil.copy(backup, registry.data / "registry.db")
    await asyncio.to_thread(registry.start)

    await edge.connect()
    fenced = await edge.open.expect("node_fenced")
    assert (fenced.node_id, fenced.node_rev) == ("n1", known.node_rev)
    session = await known.hello()
    assert (await session.expect("fenced")).cause == "generation raised"
    joined = await unknown.hello()
    welcome = await joined.expect("welcome")
    assert welcome.node_rev >> GENERATION_SHIFT == 1
    after = await edge.resolve(*(f"u{number}" for number in range(12)))
    for result in after:
        assert (result.placement.node_id, result.placement.node_rev) == ("n2", welcome.node_rev)
        assert result.placement.epoch >> GENERATION_SHIFT == 1
