"""Three registries on one etcd, started and stopped at will, with users coming in all the time.

Nodes, the edge and the log are given all three addresses. Whatever becomes of the registry that
serves, nobody who is connected notices, everybody who comes is served in the end, and the ledger
is one history.
"""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from registry_service.store.etcd_standby import LEADER_TTL_S
from steward.model.keys import DEFAULT_TENANT, GENERATION_SHIFT, UserKey
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.keys import CONTROL_KEY, USER_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.testing.etcd import EtcdCluster
from steward.testing.etcd_fleet import CLUSTER, Fleet, ServiceProcess
from steward.testing.tab import TabClosed, many_sockets, open_tab
from steward.testing.waiting import eventually
from steward.testing.witness import witness
from steward.tokens import mint
from steward.v1 import registry_service_pb2 as pb
from steward.v1.registry_service_pb2_grpc import RegistryServiceStub

pytestmark = pytest.mark.asyncio

AGENTS = Path(__file__).parent / "agents.py"
HANDED_ON_S = 2.0
"""Far below the lease, for which nobody waited. It takes 0.2 s when the machine is not busy."""
FOUND_S = 4.0
"""What clients may need to find another registry, after it serves."""
EVERY_S = 0.1

_names = count(1)


@pytest.fixture(scope="module")
def running(etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    store = f"etcd://{','.join(etcd.endpoints)}/fleet"
    agents = tuple(f"{AGENTS}:{name}" for name in ("counter", "worker"))
    with Fleet(tmp_path_factory.mktemp("fleet") / "fleet", store, agents) as fleet:
        yield fleet


@pytest.fixture
def fleet(running: Fleet, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    for each in running.registries:
        if not each.running():
            each.start()
    running.wait_whole()
    yield running
    print(running.logs())


def token(fleet: Fleet, user: str) -> str:
    key = load_or_create_key(fleet.data, USER_KEY)
    return mint(key, UserKey(DEFAULT_TENANT, user), 3600)


class Arrivals:
    """New users, one each tenth of a second, whatever becomes of those before."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.waits: list[float] = []
        self._under_way: set[asyncio.Task[None]] = set()
        self.came = 0

    async def come(self) -> None:
        async with many_sockets() as http:
            try:
                while True:
                    self.came += 1
                    user = token(self._fleet, f"new-{next(_names)}")
                    self._under_way.add(asyncio.create_task(self._one(http, user)))
                    await asyncio.sleep(EVERY_S)
            finally:
                async with asyncio.timeout(LEADER_TTL_S + FOUND_S):
                    await asyncio.gather(*self._under_way)

    async def _one(self, http: object, user: str) -> None:
        began = time.monotonic()
        while True:
            try:
                async with await open_tab(http, self._fleet.url, user) as tab:
                    end = await tab.ask("m1", "1 1", 10.0, agent="counter")
                    assert end["data"]["outcome"] == "success"
                self.waits.append(time.monotonic() - began)
                return
            except TabClosed as closed:
                # The registry was away for longer than an edge lets a user wait.
                assert closed.code == 4006
                await asyncio.sleep(EVERY_S)

    async def some_more(self) -> None:
        wanted = len(self.waits) + 5
        await eventually(lambda: len(self.waits) >= wanted, "new users are served", 20.0)


@asynccontextmanager
async def load(fleet: Fleet, file: Path) -> AsyncIterator[Arrivals]:
    """Users come, and one is there whose run goes on all the time under one manager."""
    arrivals = Arrivals(fleet)
    coming = asyncio.create_task(arrivals.come())
    try:
        async with many_sockets() as http:
            me = token(fleet, file.parent.name)
            async with witness(http, fleet, me, file) as seen:
                await arrivals.some_more()
                yield arrivals
                await arrivals.some_more()
                await seen.goes_on()
                await seen.ends()
                seen.stayed()
    finally:
        coming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await coming
    assert len(arrivals.waits) == arrivals.came
    await asyncio.to_thread(fleet.wait_whole)
    await check_records(fleet)


async def check_records(fleet: Fleet) -> None:
    """No breach, and one history, whichever registry wrote which part of it."""
    breaches, rows = await records(fleet)
    assert breaches == []
    epochs = [row.epoch for row in rows if row.kind in ("place", "takeover")]
    assert len(epochs) > 5
    # Newest first.
    assert epochs == sorted(set(epochs), reverse=True)


async def records(fleet: Fleet) -> tuple[list[Any], list[Any]]:
    """The breaches on record, and the newest rows of the ledger."""
    key = load_or_create_key(fleet.data, CONTROL_KEY)
    metadata = call_metadata(RoleCredentials(key, Role.OPERATOR, CLUSTER, "operator-test"))
    async with make_channel(fleet.registry) as channel:
        stub: Any = RegistryServiceStub(channel)
        violations = pb.ListViolationsRequest(limit=100, severity=pb.SEVERITY_BREACH, newest=True)
        listed = await stub.ListViolations(violations, metadata=metadata)
        told = await stub.ReadLedger(pb.ReadLedgerRequest(limit=1_000), metadata=metadata)
    return list(listed.violations), list(told.entries)


async def another_serves(fleet: Fleet, writer: ServiceProcess, within_s: float) -> None:
    took = await asyncio.to_thread(fleet.until_another_serves, writer, within_s)
    print(f"another registry serves after {took:.2f} s")


async def test_registries_are_stopped_and_started_at_will_and_nobody_waits_for_a_lease(
    fleet: Fleet, tmp_path: Path
) -> None:
    async with load(fleet, tmp_path / "done") as arrivals:
        for _ in range(3):
            writer = await asyncio.to_thread(fleet.writer)
            ended = asyncio.create_task(asyncio.to_thread(writer.end))
            await another_serves(fleet, writer, HANDED_ON_S)
            assert await ended == 0
            await arrivals.some_more()
            writer.start()
            await asyncio.to_thread(fleet.wait_whole)
        # One that stands by goes and comes, and that is all that happens.
        writer = await asyncio.to_thread(fleet.writer)
        other = next(each for each in fleet.registries if each is not writer)
        assert await asyncio.to_thread(other.end) == 0
        other.start()
        await arrivals.some_more()
        assert await asyncio.to_thread(fleet.writer) is writer
    assert max(arrivals.waits) < HANDED_ON_S + 1


async def test_a_registry_that_is_killed_is_followed_when_its_lease_is_over(
    fleet: Fleet, tmp_path: Path
) -> None:
    async with load(fleet, tmp_path / "done") as arrivals:
        writer = await asyncio.to_thread(fleet.writer)
        await asyncio.to_thread(writer.end, signal.SIGKILL)
        await another_serves(fleet, writer, LEADER_TTL_S + 2)
    assert max(arrivals.waits) < LEADER_TTL_S + FOUND_S


async def test_a_registry_that_is_killed_and_started_again_need_not_be_waited_for(
    fleet: Fleet, tmp_path: Path
) -> None:
    async with load(fleet, tmp_path / "done"):
        writer = await asyncio.to_thread(fleet.writer)
        await asyncio.to_thread(writer.end, signal.SIGKILL)
        began = time.monotonic()
        writer.start()
        # Which of them serves is open: its restart takes the key of the dead one away.
        await asyncio.to_thread(fleet.writer)
        assert time.monotonic() - began < LEADER_TTL_S - 1


async def test_a_registry_that_stands_still_is_left_and_ends_when_it_wakes(
    fleet: Fleet, tmp_path: Path
) -> None:
    async with load(fleet, tmp_path / "done") as arrivals:
        writer = await asyncio.to_thread(fleet.writer)
        said = len(writer.said())
        writer.send(signal.SIGSTOP)
        try:
            await another_serves(fleet, writer, LEADER_TTL_S + 2)
            # It keeps its connections, and the machine takes new ones for it: it is left anyhow.
            await arrivals.some_more()
        finally:
            writer.send(signal.SIGCONT)
        await eventually(lambda: not writer.running(), "it ends by itself")
        assert await asyncio.to_thread(writer.end) == 1
        told = writer.said()[said:]
        assert "the registry says nothing more and ends" in told
        assert "Traceback" not in told
    assert max(arrivals.waits) < LEADER_TTL_S + FOUND_S


async def test_an_old_backup_of_etcd_is_put_back_and_epochs_jump_above_all_that_were_granted(
    fleet: Fleet, etcd: EtcdCluster, tmp_path: Path
) -> None:
    early, late = f"early-{next(_names)}", f"late-{next(_names)}"
    before = await served(fleet, early, "m1")
    await asyncio.to_thread(etcd.save, tmp_path / "backup")
    # What the backup does not know, and the log does.
    lost = await served(fleet, late, "m1")
    await asyncio.to_thread(etcd.put_back, tmp_path / "backup")
    # The first write shows it: that registry ends, and what it granted is far above the store.
    new = asyncio.create_task(served(fleet, f"new-{next(_names)}", "m1"))
    await eventually(
        lambda: whole_again(fleet) and new.done(),
        "a registry serves, and nodes that it knows",
        60.0,
    )
    assert await new >> GENERATION_SHIFT == 1
    after = [await served(fleet, late, "m2"), await served(fleet, early, "m2")]
    assert before >> GENERATION_SHIFT == 0 and min(after) >> GENERATION_SHIFT == 1
    assert min(after) > lost
    # Recorded by a registry that learns it from the log; one that served has a witness of its own.
    breaches, rows = await records(fleet)
    assert {each.kind for each in breaches} <= {"fence_above_registry"}
    assert [row.kind for row in rows].count("generation") == 1


async def served(fleet: Fleet, user: str, message: str) -> int:
    """A user comes in and is answered; the epoch of his manager."""
    async with many_sockets() as http:
        while True:
            try:
                async with await open_tab(http, fleet.url, token(fleet, user)) as tab:
                    end = await tab.ask(message, "1 1", 10.0, agent="counter")
                    assert end["data"]["outcome"] == "success"
                    return int(end["epoch"])
            except TabClosed as closed:
                assert closed.code == 4006
                await asyncio.sleep(EVERY_S)


def whole_again(fleet: Fleet) -> bool:
    """Whether all are there; starts what has ended, as a supervisor does."""
    for each in fleet.processes:
        if not each.running():
            each.start()
    return fleet.whole()
