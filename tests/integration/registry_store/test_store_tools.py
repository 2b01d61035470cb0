"""`steward store copy` and `check` of registries' stores: SQLite to a real etcd, and back."""

import asyncio
import sqlite3
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest

from registry_service.core.transactions import (
    Evidence,
    FenceNode,
    JoinNode,
    MarkDraining,
    NodeClaim,
    NodeJoined,
    PlaceUser,
    RecordViolation,
    ReleasePlacement,
    StoreOperation,
)
from registry_service.store.port import PlacementStore
from registry_service.store.sqlite import SqliteStore
from registry_service.store.tools.__main__ import main
from registry_service.store.tools.contents import Contents
from registry_service.store.tools.copying import copy, differences
from registry_service.store.tools.etcd_contents import EtcdContents
from registry_service.store.tools.sqlite_contents import SqliteContents
from steward.model.keys import NodeId, NodeIncarnation, UserKey
from steward.model.violations import Violation, ViolationKind
from steward.runtime.clock import boot_ms
from steward.testing.command import run_steward
from steward.testing.etcd import EtcdCluster
from steward.testing.etcd_life import store_on

pytestmark = pytest.mark.asyncio

# Names whose order and whose characters are not those of their keys.
USERS = [UserKey(f"t{n % 3}", f"u~ü/{n:03}") for n in range(280)]
AT_MS = 1_700_000_000_000


async def steward_store(*words: object) -> "subprocess.CompletedProcess[str]":
    return await asyncio.to_thread(run_steward, "store", *words)


Tools = Callable[..., Awaitable[tuple[int, str]]]


@pytest.fixture
def tools(capsys: pytest.CaptureFixture[str]) -> Tools:
    """The same without a process of its own: the exit code, and all that was printed."""

    async def run(*words: object) -> tuple[int, str]:
        code = await asyncio.to_thread(main, list(map(str, words)))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


async def done(store: PlacementStore, *operations: StoreOperation) -> list[object]:
    outcome = await store.commit(operations)
    return list(outcome.results)  # type: ignore[union-attr]


async def fill(store: PlacementStore) -> NodeIncarnation:
    """Something of every kind; the node that has the users."""
    claims = [NodeClaim(NodeId(f"n{n}"), "boot", f"no/nce{n}", "127.0.0.1:1") for n in range(4)]
    nodes = []
    for joined in await done(store, *map(JoinNode, claims)):
        assert isinstance(joined, NodeJoined)
        nodes.append(joined.record.incarnation)
    await done(store, *(PlaceUser(user, nodes[0], "resolve") for user in USERS[:140]))
    placed = await done(store, *(PlaceUser(user, nodes[0], "resolve") for user in USERS[140:]))
    last = placed[-1].placement  # type: ignore[attr-defined]
    refusal = Violation(ViolationKind.STALE_APPEND, "fence 5", USERS[0])
    breach = Violation(ViolationKind.FOREIGN_EVENT, "of bob", count=3)
    await done(
        store,
        ReleasePlacement(last.user, last.epoch, nodes[0], "idle"),
        MarkDraining(nodes[1], "announced"),
        FenceNode(nodes[2], "lost", Evidence.PROOF, hold=True),
        RecordViolation(refusal, "agent:n1"),
        RecordViolation(breach, "edge:e1"),
    )
    return nodes[0]


def in_files(directory: Path) -> SqliteStore:
    return SqliteStore(directory / "registry.db", lambda: AT_MS)


@pytest.fixture
def url(etcd: EtcdCluster, cluster_name: str) -> str:
    return f"etcd://{','.join(etcd.endpoints)}/{cluster_name}"


async def everything(store: PlacementStore) -> tuple[object, ...]:
    """What operators and the machine see of it."""
    mark = store.mark
    return (
        mark,
        await store.placements(None, 1_000, mark.epoch),
        await store.ledger(None, 1_000),
        await store.ledger(USERS[3], 10),
        await store.violations(0, 100),
        await store.violation_totals(),
    )


async def test_a_registry_goes_on_where_it_was_on_etcd_and_back_in_files(
    etcd: EtcdCluster, cluster_name: str, url: str, tmp_path: Path, tools: Tools
) -> None:
    first = in_files(tmp_path / "old")
    await first.open()
    node = await fill(first)
    before = await everything(first)
    await first.close()

    copied = await steward_store("copy", "--from", f"sqlite:{tmp_path / 'old'}", "--to", url)
    assert copied.returncode == 0, copied.stderr
    assert "279 placements" in copied.stdout
    checked = await steward_store("check", "--store", url)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "279 placements" in checked.stdout

    on_etcd = store_on(etcd.endpoints, cluster_name, tmp_path / "home")
    view = await on_etcd.open()
    assert view.raised == "" and len(view.nodes) == 3 and len(view.holds) == 1
    assert await everything(on_etcd) == before
    (new,) = await done(on_etcd, PlaceUser(UserKey("t", "new"), node, "resolve"))
    assert new.placement.epoch == on_etcd.mark.epoch > before[0].epoch  # type: ignore[attr-defined]
    after = await everything(on_etcd)
    # A running registry is no obstacle to a check, and one to a copy.
    assert (await tools("check", "--store", url))[0] == 0
    back = f"sqlite:{tmp_path / 'new'}"
    code, said = await tools("copy", "--from", url, "--to", back)
    assert code == 2 and "served by a registry" in said
    await on_etcd.close()

    code, said = await tools("copy", "--from", url, "--to", back)
    assert code == 0, said
    assert (await tools("check", "--store", back))[0] == 0
    last = in_files(tmp_path / "new")
    view = await last.open()
    # The copy brought a witness: nothing looks like a restored backup.
    assert view.raised == ""
    assert await everything(last) == after
    await last.close()


async def run_copy(source: Contents, destination: Contents) -> int:
    await source.open()
    await destination.open()
    try:
        written = await copy(source, destination, lambda _: None)
        found, _ = await differences(source, destination, lambda _: None)
        assert found == []
        return written
    finally:
        await source.close()
        await destination.close()


async def test_an_interrupted_copy_goes_on_and_writes_only_what_is_missing(
    etcd: EtcdCluster, cluster_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = in_files(tmp_path)
    await store.open()
    await fill(store)
    await store.close()

    def destination() -> EtcdContents:
        return EtcdContents(
            store_on(etcd.endpoints, cluster_name, tmp_path)._access,
            cluster_name,
            boot_ms,
            alone=True,
        )

    class Cut(Exception):
        pass

    writes = 0
    commit = EtcdContents._commit

    async def cut(self: EtcdContents, changes: list[object]) -> None:
        nonlocal writes
        writes += 1
        if writes == 3:
            raise Cut
        await commit(self, changes)  # type: ignore[arg-type]

    monkeypatch.setattr(EtcdContents, "_commit", cut)
    with pytest.raises(Cut):
        await run_copy(SqliteContents(tmp_path, make=False), destination())
    monkeypatch.setattr(EtcdContents, "_commit", commit)
    total = len(USERS) + 15
    went_on = await run_copy(SqliteContents(tmp_path, make=False), destination())
    assert 100 < went_on < total - 90
    # The leases of nodes are made anew each time, so that they last from now on.
    assert await run_copy(SqliteContents(tmp_path, make=False), destination()) == 3
    # What changed in the source since then is brought over, and what went goes.
    await store_of(tmp_path, ReleasePlacement)
    assert 3 < await run_copy(SqliteContents(tmp_path, make=False), destination()) < 12


async def store_of(directory: Path, kind: Callable[..., StoreOperation]) -> None:
    """One user is released in the files."""
    store = in_files(directory)
    await store.open()
    (placement, *_) = await store.placements(None, 1, store.mark.epoch)
    await done(store, kind(placement.user, placement.epoch, placement.incarnation, "idle"))
    await store.close()


async def test_a_store_that_was_used_is_never_replaced(
    etcd: EtcdCluster, cluster_name: str, url: str, tmp_path: Path, tools: Tools
) -> None:
    source = f"sqlite:{tmp_path / 'old'}"
    store = in_files(tmp_path / "old")
    await store.open()
    await fill(store)
    await store.close()
    assert (await tools("copy", "--from", source, "--to", url))[0] == 0
    served = store_on(etcd.endpoints, cluster_name, tmp_path / "home")
    await served.open()
    await served.close()
    code, said = await tools("copy", "--from", source, "--to", url)
    assert code == 2 and "written to since it was copied" in said
    code, said = await tools("copy", "--from", url, "--to", source)
    assert code == 2 and "written to since" in said
    other = in_files(tmp_path / "other")
    await other.open()
    await fill(other)
    await other.close()
    code, said = await tools("copy", "--from", url, "--to", f"sqlite:{tmp_path / 'other'}")
    assert code == 2 and "another registry's store" in said
    code, said = await tools("copy", "--from", f"{url}-empty", "--to", f"sqlite:{tmp_path / 'e'}")
    assert code == 2 and "holds no registry's store" in said


async def test_a_copy_keeps_the_newest_rows_of_a_long_ledger(
    etcd: EtcdCluster, cluster_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EtcdContents, "most_rows", 100)
    store = in_files(tmp_path / "old")
    await store.open()
    await fill(store)
    rows = await store.ledger(None, 100)
    await store.close()

    def on_etcd() -> EtcdContents:
        access = store_on(etcd.endpoints, cluster_name, tmp_path)._access
        return EtcdContents(access, cluster_name, boot_ms, alone=True)

    await run_copy(SqliteContents(tmp_path / "old", make=False), on_etcd())
    await run_copy(on_etcd(), SqliteContents(tmp_path / "new", make=True))
    again = in_files(tmp_path / "new")
    await again.open()
    assert await again.ledger(None, 1_000) == rows
    # The marks by which a user's rows are found begin where the rows do.
    mine = await again.ledger(USERS[270], 10)
    assert [row.kind for row in mine] == ["place"]
    await again.close()


@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        ("DELETE FROM placement WHERE epoch = 20", "was placed under 20, and is nowhere"),
        ("UPDATE placement SET epoch = 999999 WHERE epoch = 20", "the head is at"),
        ("UPDATE placement SET epoch = 21 WHERE epoch = 20", "as somebody else"),
        ("DELETE FROM ledger WHERE number = 30", "is row 31, after 29"),
        ("UPDATE violation SET number = 77 WHERE number = 2", "is above the last one"),
        ("UPDATE node SET node_rev = 888888 WHERE node_id = 'n0'", "has revision 888888"),
    ],
)
async def test_what_does_not_hold_together_is_found(
    tmp_path: Path, tools: Tools, statement: str, finding: str
) -> None:
    store = in_files(tmp_path)
    await store.open()
    await fill(store)
    await store.close()
    name = f"sqlite:{tmp_path}"
    assert (await tools("check", "--store", name))[0] == 0
    with closing(sqlite3.connect(tmp_path / "registry.db")) as db:
        db.execute(statement)
        db.execute("UPDATE sqlite_sequence SET seq = 2 WHERE name = 'violation'")
        db.commit()
    code, said = await tools("check", "--store", name)
    assert code == 1 and finding in said, said


async def test_a_placement_that_something_else_removed_from_etcd_is_found(
    etcd: EtcdCluster, cluster_name: str, url: str, tmp_path: Path, tools: Tools
) -> None:
    store = store_on(etcd.endpoints, cluster_name, tmp_path)
    await store.open()
    await fill(store)
    assert (await tools("check", "--store", url))[0] == 0
    await asyncio.to_thread(etcd.control, "del", store._keys.placement(USERS[0]).decode())
    code, said = await tools("check", "--store", url)
    assert code == 1 and "the head says 279 placements, and there are 278" in said
    await store.close()
