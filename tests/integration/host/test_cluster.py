"""Registry, nodes and log in one process: moves, drains and evictions of users with runs."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from agent_service.log.port import ReadRange
from agent_service.log.sqlite import SqliteLog
from registry_service.store.sqlite import SqliteStore
from steward.client.checks import check_stream
from steward.errors import Reason
from steward.model.keys import UserKey
from steward.runtime.clock import wall_ms
from steward.telemetry.catalog import LogMetrics
from steward.testing.cluster import InProcessCluster
from steward.testing.waiting import eventually

AGENT = """
import asyncio

async def count(run):
    async def work(n):
        await asyncio.sleep(0.01)
        return n
    await run.think("counting")
    for n in range(12):
        await run.say(f"{n} ")
        await asyncio.sleep(0.02)
        if n % 3 == 2:
            await run.tool("work", {"n": n}, work)
    return "counted"
"""
SAID = "".join(f"{n} " for n in range(12))
USERS = [UserKey("default", f"user-{number}") for number in range(12)]


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    (tmp_path / "count.py").write_text(AGENT)
    log = SqliteLog(tmp_path, LogMetrics(CollectorRegistry()))
    await log.open()
    store = SqliteStore(tmp_path / "registry.db", wall_ms)
    agents = [f"{tmp_path / 'count.py'}:count"]
    async with InProcessCluster(store, log, agents, nodes=3) as cluster:
        yield cluster


async def stored(cluster: InProcessCluster, user: UserKey) -> list[dict[str, Any]]:
    page = await cluster.log.read(user, ReadRange(limit=1000))
    return [orjson.loads(payload) for payload in page.events]


async def begin(cluster: InProcessCluster, users: list[UserKey]) -> Any:
    edge = cluster.edge("edge-0")
    for user in users:
        await edge.attach(user)
        await edge.send(user, "m1", "go")
    for user in users:
        await eventually(lambda user=user: "agent_text" in edge.types(user), "it runs")
    return edge


async def assert_told_once(cluster: InProcessCluster, user: UserKey, moves: int) -> None:
    async def over() -> bool:
        return (await stored(cluster, user))[-1]["type"] == "agent_completed"

    await eventually(over, "the run ends")
    events = await stored(cluster, user)
    assert check_stream(events) == []
    assert "".join(e["data"]["delta"] for e in events if e["type"] == "agent_text") == SAID
    assert events[-1]["data"]["outcome"] == "success"
    causes = [e["data"]["cause"] for e in events if e["type"] == "manager_moved"]
    assert causes == ["handoff"] * moves


@pytest.mark.asyncio
async def test_a_user_is_moved_in_the_middle_of_a_run_without_anybody_attached_there(
    cluster: InProcessCluster,
) -> None:
    user = USERS[0]
    edge = await begin(cluster, [user])
    first = edge.placements[user]
    moved = await cluster.move(user)
    assert (moved.node_id, moved.epoch) > ("", first.epoch)
    assert moved.node_id != first.node_id
    assert edge.lost[user] == [(first.epoch, Reason.MANAGER_MOVED, 0)]
    await asyncio.sleep(0.05)
    await cluster.move(user)
    await assert_told_once(cluster, user, 2)


@pytest.mark.asyncio
async def test_a_drained_node_loses_every_user_and_none_of_its_runs(
    cluster: InProcessCluster,
) -> None:
    edge = await begin(cluster, USERS)
    node = cluster.node_of(edge.placements[USERS[0]])
    mine = [user for user in USERS if edge.placements[user].node_id == node.name]
    await cluster.drain(node)
    await eventually(lambda: node.host.managers == 0, "the node is empty")
    for user in USERS:
        await assert_told_once(cluster, user, int(user in mine))
    assert (await cluster.resolve(mine[0])).node_id != node.name


@pytest.mark.asyncio
async def test_an_evicted_users_run_is_cancelled_and_a_new_message_is_a_new_beginning(
    cluster: InProcessCluster,
) -> None:
    user = USERS[0]
    edge = await begin(cluster, [user])
    epoch = edge.placements[user].epoch
    await cluster.evict(user)
    assert edge.lost[user] == [(epoch, Reason.USER_EVICTED, 0)]
    events = await stored(cluster, user)
    assert events[-1]["data"]["outcome"] == "cancelled"
    await edge.attach(user)
    assert edge.placements[user].epoch > epoch
    await edge.send(user, "m2", "again")
    await eventually(lambda: edge.types(user)[-1] == "agent_completed", "it runs anew")
    assert check_stream(await stored(cluster, user)) == []
