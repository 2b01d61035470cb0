"""Registry processes on a real etcd: one serves, another takes over, a restored past is noticed."""

import asyncio
import shutil
import time
import urllib.error
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from registry_service.store.etcd_standby import LEADER_TTL_S
from steward.model.keys import GENERATION_SHIFT
from steward.rpc.roles import Role
from steward.testing.etcd import EtcdCluster, missing
from steward.v1 import registry_service_pb2

pytestmark = pytest.mark.asyncio

USERS = [f"user-{number}" for number in range(20)]


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    if why := missing():
        pytest.skip(why)
    with EtcdCluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@dataclass
class Group:
    """Two processes with the same keys, and the address of whichever serves."""

    first: Any
    second: Any

    @property
    def data(self) -> Path:
        return Path(self.first.data)

    @property
    def address(self) -> str:
        return f"ipv4:{self.first.address},{self.second.address}"


@pytest.fixture
def group(
    etcd: EtcdCluster,
    make_registry: Callable[..., Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Group:
    """The first serves; the second is not started yet."""
    store = f"etcd://{','.join(etcd.endpoints)}/{request.node.name}"
    first = make_registry(tmp_path / "first", store=store)
    second = make_registry(tmp_path / "second", store=store)
    first.start()
    shutil.copytree(first.data / "keys", second.data / "keys")
    return Group(first, second)


@pytest_asyncio.fixture
async def members(group: Group, clients_of: Callable[[Any], Any]) -> AsyncIterator[Any]:
    made = clients_of(group)
    yield made
    await made.close()


def epochs(results: list[Any]) -> dict[str, int]:
    return {result.user.user_id: result.placement.epoch for result in results}


async def again(members: Any, group: Group, node: Any, until: Callable[..., Any]) -> Any:
    """The node comes back as the process that it is, and an edge comes."""
    await node.open.end()
    await node.stop_beating()

    async def back() -> bool:
        session = await node.hello()
        while not session.ended.is_set():
            message = await session._messages.get()
            if message.WhichOneof("body") == "welcome":
                node.open, welcome = session, message.welcome
                assert welcome.node_rev == node.node_rev
                return True
        return False

    await until(back)
    node.beating = asyncio.create_task(node._beat(node.open))
    edge = members.edge("e2")
    await edge.connect()
    return edge


def standing_by(process: Any) -> bool:
    """It runs, and says that it does not serve."""
    try:
        process.ops("/readyz")
    except urllib.error.HTTPError as error:
        return error.code == 503
    except OSError:
        return False
    raise AssertionError("two registries serve")


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_another_registry_takes_over_and_everybody_stays_where_he_is(
    group: Group, members: Any, until: Callable[..., Any], how: str
) -> None:
    node, edge = members.node("n1"), members.edge("e1")
    await node.join()
    await edge.connect()
    placed = epochs(await edge.resolve(*USERS))
    group.second.process = group.second.spawn()
    await until(lambda: standing_by(group.second))
    began = time.monotonic()
    if how == "stopped":
        assert group.first.stop() == 0
    else:
        group.first.kill()
    group.second.wait_ready()
    took = time.monotonic() - began
    assert took < (3 if how == "stopped" else LEADER_TTL_S + 4), took
    edge = await again(members, group, node, until)
    assert epochs(await edge.resolve(*USERS)) == placed
    (new,) = epochs(await edge.resolve("new")).values()
    assert new > max(placed.values())


async def test_a_registry_that_is_killed_and_started_again_serves_at_once(
    group: Group, members: Any, until: Callable[..., Any]
) -> None:
    node, edge = members.node("n1"), members.edge("e1")
    await node.join()
    await edge.connect()
    placed = epochs(await edge.resolve(*USERS))
    group.first.kill()
    began = time.monotonic()
    group.first.start()
    assert time.monotonic() - began < LEADER_TTL_S
    edge = await again(members, group, node, until)
    assert epochs(await edge.resolve(*USERS)) == placed


async def test_a_restored_etcd_is_noticed_by_the_log_and_epochs_jump_above_it(
    tmp_path: Path,
    make_registry: Callable[..., Any],
    clients_of: Callable[[Any], Any],
    until: Callable[..., Any],
) -> None:
    if why := missing():
        pytest.skip(why)
    with EtcdCluster(tmp_path / "etcd") as etcd:
        store = f"etcd://{','.join(etcd.endpoints)}/restored"
        first = make_registry(tmp_path / "first", store=store)
        first.start()
        clients = clients_of(first)
        node, edge = clients.node("n1"), clients.edge("e1")
        await node.join()
        await edge.connect()
        await edge.resolve(*USERS)
        etcd.save(tmp_path / "backup")
        lost = epochs(await edge.resolve(*(f"late-{number}" for number in range(20))))
        first.kill()
        await node.stop_beating()
        etcd.put_back(tmp_path / "backup")
        # On a machine that has never served: it has no witness of its own.
        second = make_registry(tmp_path / "second", store=store)
        second.start()
        others = clients_of(second)
        node, edge = others.node("n2"), others.edge("e1")
        node.log_head = max(lost.values())
        session = await node.hello()
        await session.expect("welcome")
        # That process is of the lost past too: it is fenced, and comes again as another.
        await session.next("fenced", "renewed")
        node = others.node("n2")
        node.log_head = max(lost.values())
        await node.join()
        await edge.connect()
        for _ in range(2):
            # Of every process of the lost past that nobody saw die: the old one may still run.
            await edge.open.next("node_fenced")
        after = epochs(await edge.resolve(*USERS, *lost))
        assert min(after.values()) >> GENERATION_SHIFT == 1
        assert min(after.values()) > max(lost.values())
        client = others.of(Role.OPERATOR)
        request = registry_service_pb2.ListViolationsRequest(limit=10)
        listed = await client.stub.ListViolations(request, metadata=client.metadata())
        assert [each.kind for each in listed.violations] == ["fence_above_registry"]
        await others.close()
        await clients.close()
