"""What users see of an outage of registry, log or auth: at most a pause, and mostly nothing.

The tests share one cluster. Each does one thing to one process of it, and leaves all ready.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from steward.testing.local_cluster import LocalCluster
from steward.testing.tab import many_sockets, open_tab
from steward.testing.waiting import eventually
from steward.testing.witness import SOON_S, witness

pytestmark = pytest.mark.asyncio

LEASE_S = 3.0

TokenOf = Callable[[LocalCluster, str], str]


@pytest.fixture(scope="module")
def running(start_shared: Any) -> LocalCluster:
    cluster: LocalCluster = start_shared(
        environ={"STEWARD_REGISTRY_TTL_MS": str(int(LEASE_S * 1000))}
    )
    return cluster


@pytest.fixture
def cluster(running: LocalCluster, clusters_to_show: list[LocalCluster]) -> LocalCluster:
    clusters_to_show.append(running)
    running.wait_healed()
    return running


async def incarnations(cluster: LocalCluster) -> dict[str, int]:
    answer = await asyncio.to_thread(cluster.try_steward, "status", "--json")
    return {node["node_id"]: node["node_rev"] for node in json.loads(answer.stdout)["nodes"]}


async def kill(cluster: LocalCluster, *names: str) -> None:
    """Kill processes at the same time, and return when `up` has started them again."""
    pids = {name: cluster.processes[name]["pid"] for name in names}
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    for name, pid in pids.items():
        again = lambda name=name, pid=pid: cluster.processes[name]["pid"] != pid  # noqa: E731
        await eventually(again, f"{name} is started again", SOON_S)


@asynccontextmanager
async def stopped(cluster: LocalCluster, name: str) -> AsyncIterator[None]:
    pid = int(cluster.processes[name]["pid"])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_killed_registry_is_not_noticed_and_new_users_wait(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    before = await incarnations(cluster)
    async with (
        many_sockets() as http,
        witness(http, cluster, token_of(cluster, "registry-1"), tmp_path / "done") as seen,
    ):
        killing = asyncio.ensure_future(kill(cluster, "registry"))
        new = await open_tab(http, cluster.url, token_of(cluster, "registry-2"))
        end = await new.ask("m1", "3 1", SOON_S, agent="counter")
        assert end["data"]["outcome"] == "success"
        await new.close()
        await killing
        await seen.goes_on()
        await seen.ends()
        seen.stayed()
    await asyncio.to_thread(cluster.wait_healed)
    assert await incarnations(cluster) == before, "the same nodes found back"


async def test_a_registry_that_stood_still_fences_nobody(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    """What it finds in silence when it goes on is its own silence."""
    before = await incarnations(cluster)
    async with (
        many_sockets() as http,
        witness(http, cluster, token_of(cluster, "still-1"), tmp_path / "done") as seen,
    ):
        async with stopped(cluster, "registry"):
            await asyncio.sleep(1.5 * LEASE_S)
        await seen.goes_on()
        await seen.ends()
        seen.stayed()
        new = await open_tab(http, cluster.url, token_of(cluster, "still-2"))
        await new.close()
    assert await incarnations(cluster) == before


async def test_a_log_that_is_killed_twice_costs_pauses_and_nothing_else(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    before = await incarnations(cluster)
    async with (
        many_sockets() as http,
        witness(http, cluster, token_of(cluster, "log-1"), tmp_path / "done") as seen,
    ):
        await kill(cluster, "log")
        await kill(cluster, "log")
        await seen.goes_on()
        await seen.ends()
        seen.stayed()
    assert await incarnations(cluster) == before, "nobody moves when the log is away for all"


async def test_a_log_that_stands_still_is_a_pause(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    before = await incarnations(cluster)
    async with (
        many_sockets() as http,
        witness(http, cluster, token_of(cluster, "frozen-1"), tmp_path / "done") as seen,
    ):
        async with stopped(cluster, "log"):
            await asyncio.sleep(3)
        await seen.goes_on()
        await seen.ends()
        seen.stayed()
    assert await incarnations(cluster) == before


async def test_without_auth_who_is_in_stays_in_and_newcomers_are_told_503(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    token = token_of(cluster, "auth-2")
    async with (
        many_sockets() as http,
        witness(http, cluster, token_of(cluster, "auth-1"), tmp_path / "done") as seen,
    ):
        async with stopped(cluster, "auth"):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await open_tab(http, cluster.url, token)
            assert refused.value.status == 503
            assert refused.value.headers is not None and "Retry-After" in refused.value.headers
            await seen.goes_on()
        # Killed, until it is back: the same, or the handshake waits.
        killing = asyncio.ensure_future(kill(cluster, "auth"))

        async def let_in() -> bool:
            try:
                async with await open_tab(http, cluster.url, token):
                    return True
            except aiohttp.WSServerHandshakeError as refused:
                assert refused.status == 503
                return False

        await eventually(let_in, "auth is back", SOON_S)
        await killing
        await seen.ends()
        seen.stayed()


@pytest.mark.parametrize("other", ["registry", "log"])
async def test_a_node_that_dies_together_with_another_process_is_still_replaced(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path, other: str
) -> None:
    async with (
        many_sockets() as http,
        witness(http, cluster, token_of(cluster, f"both-{other}"), tmp_path / "done") as seen,
    ):
        node = seen.tab.ready["manager"]["node_id"]
        killing = asyncio.ensure_future(kill(cluster, other, node))
        moved = await seen.tab.until("manager_moved", SOON_S)
        assert moved["data"]["from_node"] == node
        await killing
        await seen.goes_on()
        await seen.ends()
