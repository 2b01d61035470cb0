"""A whole cluster whose registry is on etcd: what users see when etcd has an outage.

The tests share one cluster and one etcd of three members, and leave both whole.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from steward.testing.etcd import EtcdCluster
from steward.testing.etcd_network import SKIPPED as NO_NETWORK
from steward.testing.etcd_network import Network
from steward.testing.local_cluster import LocalCluster, is_running
from steward.testing.tab import TabClosed, many_sockets, open_tab
from steward.testing.waiting import eventually
from steward.testing.witness import SOON_S, Witness, witness

pytestmark = pytest.mark.asyncio

PAUSE_S = 15.0
TRY_AGAIN = 4006

TokenOf = Callable[[LocalCluster, str], str]


@pytest.fixture(scope="module")
def running(etcd: EtcdCluster, start_shared: Any) -> LocalCluster:
    store = f"etcd://{','.join(etcd.endpoints)}/e2e"
    cluster: LocalCluster = start_shared(environ={"STEWARD_REGISTRY_STORE": store})
    return cluster


@pytest.fixture
def cluster(running: LocalCluster, clusters_to_show: list[LocalCluster]) -> LocalCluster:
    clusters_to_show.append(running)
    running.wait_healed()
    return running


@asynccontextmanager
async def attached(cluster: LocalCluster, token: str, file: Path) -> AsyncIterator[Witness]:
    """A user whose run with tools is in flight, and who must not notice anything."""
    async with many_sockets() as http, witness(http, cluster, token, file) as seen:
        yield seen
        await seen.goes_on()
        await seen.ends()
        seen.kept_manager()


async def new_user(cluster: LocalCluster, token: str) -> None:
    """Comes in, and is served."""
    async with many_sockets() as http, await open_tab(http, cluster.url, token) as tab:
        end = await tab.ask("m1", "3 1", SOON_S, agent="counter")
        assert end["data"]["outcome"] == "success"


async def incarnations(cluster: LocalCluster) -> dict[str, int]:
    answer = await asyncio.to_thread(cluster.steward, "status", "--json")
    return {node["node_id"]: node["node_rev"] for node in json.loads(answer.stdout)["nodes"]}


async def test_the_leader_of_etcd_is_killed_and_nobody_notices(
    cluster: LocalCluster, etcd: EtcdCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    before, pid = await incarnations(cluster), cluster.processes["registry"]["pid"]
    async with attached(cluster, token_of(cluster, "kill-1"), tmp_path / "done"):
        leader = await asyncio.to_thread(etcd.leader)
        leader.kill()
        await new_user(cluster, token_of(cluster, "kill-2"))
    etcd.restart(leader)
    await asyncio.to_thread(etcd.wait_healthy)
    assert await incarnations(cluster) == before
    assert cluster.processes["registry"]["pid"] == pid


async def test_the_network_of_the_leader_of_etcd_is_cut_and_nobody_notices(
    cluster: LocalCluster,
    etcd: EtcdCluster,
    network: Network | None,
    token_of: TokenOf,
    tmp_path: Path,
) -> None:
    if network is None:
        pytest.skip(NO_NETWORK)
    before, pid = await incarnations(cluster), cluster.processes["registry"]["pid"]
    async with attached(cluster, token_of(cluster, "cut-1"), tmp_path / "done"):
        leader = etcd.members.index(await asyncio.to_thread(etcd.leader))
        network.cut(leader)
        try:
            await new_user(cluster, token_of(cluster, "cut-2"))
        finally:
            network.mend(leader)
        await asyncio.to_thread(etcd.wait_healthy)
        await new_user(cluster, token_of(cluster, "cut-3"))
    assert await incarnations(cluster) == before
    assert cluster.processes["registry"]["pid"] == pid


async def test_a_full_quota_of_etcd_keeps_out_new_users_and_nobody_else(
    cluster: LocalCluster, etcd: EtcdCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    before, pid = await incarnations(cluster), cluster.processes["registry"]["pid"]
    async with attached(cluster, token_of(cluster, "quota-1"), tmp_path / "done") as seen:
        await asyncio.to_thread(etcd.be_full)
        try:
            with pytest.raises(TabClosed) as refused:
                await new_user(cluster, token_of(cluster, "quota-2"))
            assert refused.value.code == TRY_AGAIN
            await seen.goes_on()
        finally:
            etcd.control("alarm", "disarm")
        await new_user(cluster, token_of(cluster, "quota-3"))
    assert await incarnations(cluster) == before
    assert cluster.processes["registry"]["pid"] == pid


async def test_two_of_three_members_stand_still_for_15_s_and_only_new_users_wait(
    cluster: LocalCluster, etcd: EtcdCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    before, pid = await incarnations(cluster), cluster.processes["registry"]["pid"]
    async with attached(cluster, token_of(cluster, "away-1"), tmp_path / "done") as seen:
        leader = await asyncio.to_thread(etcd.leader)
        other = next(member for member in etcd.members if member is not leader)
        began = asyncio.get_running_loop().time()
        for member in (leader, other):
            member.signal(signal.SIGSTOP)
        try:
            # The registry may not speak for the store any more, ends, and waits for etcd.
            await eventually(lambda: not is_running(pid), "the registry has ended", PAUSE_S)
            await asyncio.sleep(began + PAUSE_S - asyncio.get_running_loop().time())
            await seen.goes_on()
        finally:
            for member in (leader, other):
                member.signal(signal.SIGCONT)
        await asyncio.to_thread(cluster.wait_healed)
        await new_user(cluster, token_of(cluster, "away-2"))
    assert await incarnations(cluster) == before, "the same nodes found back"


async def test_a_killed_registry_finds_everybody_where_he_was(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    before, pid = await incarnations(cluster), cluster.processes["registry"]["pid"]
    async with attached(cluster, token_of(cluster, "registry-1"), tmp_path / "done"):
        os.kill(pid, signal.SIGKILL)
        again = lambda: cluster.processes["registry"]["pid"] != pid  # noqa: E731
        await eventually(again, "the registry is started again", SOON_S)
        await asyncio.to_thread(cluster.wait_healed)
        await new_user(cluster, token_of(cluster, "registry-2"))
    assert await incarnations(cluster) == before


async def test_after_all_outages_the_report_has_nothing_broken(
    cluster: LocalCluster, check_report: Callable[[LocalCluster], None]
) -> None:
    await asyncio.to_thread(check_report, cluster)
    assert cluster.all_ready()
