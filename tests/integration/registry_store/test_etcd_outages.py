"""Outages of a real etcd under load: nothing acknowledged is lost, and service comes back alone.

Outages that last are played side by side, each with an etcd of its own, so that the time is waited
for once.
"""

import asyncio
import json
import signal
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from registry_service.core.transactions import JoinNode, NodeClaim
from registry_service.store.etcd_client import EtcdAccess, EtcdClient
from registry_service.store.etcd_lease import grant, new_lease, renew
from registry_service.store.etcd_standby import LEADER_TTL_S
from steward.model.keys import NodeId
from steward.testing import etcd_network
from steward.testing.etcd import EtcdCluster
from steward.testing.etcd_life import SHORT_LEASE_S, Life, committed, join, store_on
from steward.testing.etcd_network import Network
from steward.testing.proxy import CutProxy
from steward.testing.waiting import eventually

pytestmark = pytest.mark.asyncio

PAUSE_S = 15.0
THAW_S = 2.0
LIVE_LEASES = 20

MakeEtcd = Callable[..., list[EtcdCluster]]


async def off_the_loop(call: Callable[..., Any], *arguments: Any) -> Any:
    """For calls that wait for a process: registries and leases live on the loop."""
    return await asyncio.to_thread(call, *arguments)


async def check_after(life: Life, endpoints: tuple[str, ...], name: str, home: Path) -> None:
    """By a registry on another machine, which has only what is in etcd."""
    store = store_on(endpoints, name, home)
    await store.open()
    try:
        await life.check(store)
    finally:
        await store.close()


async def check_side_by_side(*scenarios: Awaitable[None]) -> None:
    async with asyncio.TaskGroup() as group:
        for scenario in scenarios:
            group.create_task(_run(scenario))


async def _run(scenario: Awaitable[None]) -> None:
    await scenario


async def test_the_leader_of_etcd_is_killed(
    make_etcd: MakeEtcd, installed: str, newer: str, tmp_path: Path
) -> None:
    async def killed(etcd: EtcdCluster, home: Path) -> None:
        life = Life(etcd.endpoints, "killed", home / "a")
        async with life:
            await life.serves()
            (await off_the_loop(etcd.leader)).kill()
            await life.serves()
        # An election, and not the end of this process.
        assert life.ended == []
        assert life.slowest_s < LEADER_TTL_S
        await check_after(life, etcd.endpoints, "killed", home / "b")

    old, new = make_etcd(installed, newer)
    await check_side_by_side(killed(old, tmp_path / "old"), killed(new, tmp_path / "new"))


class LiveLeases:
    """Leases that are renewed all the time; `lost` are those of which etcd said that they went."""

    def __init__(self, etcd: EtcdCluster) -> None:
        self._endpoints = etcd.endpoints
        self.lost: set[int] = set()

    async def __aenter__(self) -> "LiveLeases":
        self._client = EtcdClient(EtcdAccess(self._endpoints))
        self._leases = [new_lease() for _ in range(LIVE_LEASES)]
        for lease in self._leases:
            await grant(self._client, lease, LEADER_TTL_S, 5)
        self._renewing = asyncio.create_task(self._renew())
        return self

    async def _renew(self) -> None:
        while True:
            answers = [renew(self._client, lease) for lease in self._leases]
            for lease, renewed in zip(self._leases, await asyncio.gather(*answers), strict=True):
                if renewed is False:
                    self.lost.add(lease)
            await asyncio.sleep(LEADER_TTL_S / 5)

    async def __aexit__(self, *_: object) -> None:
        self._renewing.cancel()
        await asyncio.wait({self._renewing})
        await self._client.close()


async def the_leader_stands_still(etcd: EtcdCluster, home: Path) -> None:
    """A thawed leader revokes leases that were renewed while it stood still: expected, and borne.

    Not always; 3.4.23 does it in about every other thaw, and so does 3.5.35, though versions from
    3.5.13 on are said not to.
    """
    life = Life(etcd.endpoints, "leader", home / "a")
    async with life, LiveLeases(etcd) as live:
        await life.serves()
        node = life.node
        frozen = await off_the_loop(etcd.leader)
        frozen.signal(signal.SIGSTOP)
        await life.serves()
        # Longer than any lease here.
        await asyncio.sleep(PAUSE_S)
        assert life.ended == []
        assert live.lost == set()
        frozen.signal(signal.SIGCONT)
        await asyncio.sleep(THAW_S)
        await life.serves()
        print(f"{home.name}: {len(live.lost)} of {LIVE_LEASES} live leases were revoked")
        # The registry may have lost its lease by that, and has led anew; the node lives on.
        assert life.node == node
        assert len(life.ended) <= 1 and all("no longer" in why for why in life.ended), life.ended
    await check_after(life, etcd.endpoints, "leader", home / "b")


async def all_of_etcd_stands_still(etcd: EtcdCluster, home: Path) -> None:
    life = Life(etcd.endpoints, "all", home / "a")
    async with life:
        await life.serves()
        for member in etcd.members:
            member.signal(signal.SIGSTOP)
        await asyncio.sleep(PAUSE_S)
        for member in etcd.members:
            member.signal(signal.SIGCONT)
        await life.serves()
        assert len(life.ended) == 1
    await check_after(life, etcd.endpoints, "all", home / "b")


async def test_the_leader_or_all_of_etcd_stand_still_for_15_s_and_thaw(
    make_etcd: MakeEtcd, installed: str, newer: str, tmp_path: Path
) -> None:
    old, new, whole = make_etcd(installed, newer, installed)
    await check_side_by_side(
        the_leader_stands_still(old, tmp_path / "old"),
        the_leader_stands_still(new, tmp_path / "new"),
        all_of_etcd_stands_still(whole, tmp_path / "whole"),
    )


async def two_of_three_are_away(etcd: EtcdCluster, home: Path) -> None:
    life = Life(etcd.endpoints, "two", home / "a", SHORT_LEASE_S)
    async with life:
        await life.serves()
        for member in etcd.members[:2]:
            member.kill()
        served = life.served
        await asyncio.sleep(SHORT_LEASE_S + 2)
        # No majority, no answer; the registry has ended, as one that may lead no more.
        assert life.served - served < 50
        assert len(life.ended) == 1
        for member in etcd.members[:2]:
            etcd.restart(member)
        await life.serves(within_s=60)
    await check_after(life, etcd.endpoints, "two", home / "b")


async def the_quota_is_full(etcd: EtcdCluster, home: Path) -> None:
    """It stops new placements and nothing else."""
    life = Life(etcd.endpoints, "quota", home / "a")
    async with life:
        await life.serves()
        await off_the_loop(_set_quota, etcd)
        while "NOSPACE" not in await off_the_loop(etcd.control, "alarm", "list"):
            await off_the_loop(_fill, etcd)
        ended, served = len(life.ended), life.served
        await asyncio.sleep(LEADER_TTL_S + 1)
        assert life.served - served < 50
        # It keeps its lease, and the store: only what must be written waits.
        assert len(life.ended) == ended
        await off_the_loop(_make_room, etcd)
        await life.serves()
    await check_after(life, etcd.endpoints, "quota", home / "b")


def _set_quota(etcd: EtcdCluster) -> None:
    for member in etcd.members:
        member.kill()
        member.add_options("--quota-backend-bytes=600000")
        etcd.restart(member)
    etcd.wait_healthy()


def _fill(etcd: EtcdCluster) -> None:
    try:
        for number in range(20):
            etcd.control("put", f"fill-{number}", "x" * 50_000)
    except subprocess.CalledProcessError as error:
        assert "space" in error.stderr, error.stderr


def _make_room(etcd: EtcdCluster) -> None:
    etcd.control("del", "--prefix", "fill")
    status = json.loads(etcd.control("endpoint", "status", "-w", "json"))
    revision = status[0]["Status"]["header"]["revision"]
    etcd.control("compact", str(revision))
    for endpoint in etcd.endpoints:
        etcd.control("defrag", endpoints=(endpoint,))
    etcd.control("alarm", "disarm")


async def test_a_majority_is_away_or_the_quota_full_for_longer_than_a_lease(
    make_etcd: MakeEtcd, installed: str, tmp_path: Path
) -> None:
    first, second = make_etcd(installed, installed)
    await check_side_by_side(
        two_of_three_are_away(first, tmp_path / "two"),
        the_quota_is_full(second, tmp_path / "quota"),
    )


async def test_the_network_of_the_leader_of_etcd_is_cut(installed: str, tmp_path: Path) -> None:
    """It runs on, and neither its peers nor the registry reach it."""
    if why := etcd_network.missing():
        pytest.skip(why)
    with Network() as network, EtcdCluster(tmp_path / "etcd", network=network) as etcd:
        life = Life(etcd.endpoints, "cut", tmp_path / "a")
        async with life:
            await life.serves()
            leader = await off_the_loop(etcd.leader)
            network.cut(etcd.members.index(leader))
            await life.serves()
            await asyncio.sleep(LEADER_TTL_S)
            await life.serves()
            assert await off_the_loop(etcd.leader, leader) is not leader
            network.mend(etcd.members.index(leader))
            await off_the_loop(etcd.wait_healthy)
            await life.serves()
        assert life.ended == []
        await check_after(life, etcd.endpoints, "cut", tmp_path / "b")


async def test_etcd_loses_the_lease_of_the_registry_that_serves(
    etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    """What a thawed leader of etcd does now and then, here for certain."""
    life = Life(etcd.endpoints, cluster_name, tmp_path / "a")
    async with life:
        for times in range(1, 3):
            await life.serves()
            node, tenure = life.node, life.store._tenure
            assert tenure is not None
            await off_the_loop(etcd.control, "lease", "revoke", f"{tenure.lease:x}")
            await eventually(lambda times=times: len(life.ended) == times, "it has ended")  # type: ignore[misc]
        await life.serves()
        assert life.node == node
    await check_after(life, etcd.endpoints, cluster_name, tmp_path / "b")


async def test_answers_are_lost_again_and_again(
    etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    """Connections break at any moment: what was carried out is not carried out twice."""
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(CutProxy(each)) for each in etcd.endpoints]
        life = Life(tuple(proxy.address for proxy in proxies), cluster_name, tmp_path / "a")
        async with life:
            for _ in range(10):
                await life.serves(20)
                for proxy in proxies:
                    await proxy.break_off()
            for _ in range(3):
                await life.serves(20)
                # Requests go through, or not, and answers come when nobody waits any more.
                for proxy in proxies:
                    proxy.cut()
                await asyncio.sleep(0.5)
                for proxy in proxies:
                    proxy.mend()
            await life.serves()
        assert life.ended == []
    await check_after(life, etcd.endpoints, cluster_name, tmp_path / "b")


async def test_one_member_of_three_can_not_be_reached(
    etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    async with CutProxy(etcd.endpoints[0]) as proxy:
        endpoints = (proxy.address, *etcd.endpoints[1:])
        # Short, but with time for a renewal that comes late on a busy machine.
        lease_s = SHORT_LEASE_S + 1
        life = Life(endpoints, cluster_name, tmp_path / "a", lease_s)
        async with life:
            await life.serves()
            proxy.cut()
            await life.serves()
            await asyncio.sleep(lease_s + 1)
            await life.serves()
        assert life.ended == []
        proxy.mend()


async def test_a_lease_of_a_node_that_etcd_lost_is_made_again(
    etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    store = store_on(etcd.endpoints, cluster_name, tmp_path / "a", nodes_every_s=0.2)
    await store.open()
    node = await join(store)
    lease = store._state.leases[node.node_id]
    etcd.control("lease", "revoke", f"{lease:x}")
    key = store._keys.node(node.node_id).decode()
    await eventually(lambda: etcd.control("get", key), "its key is there again")
    await store.close()
    # The same incarnation for the next one that leads.
    again = store_on(etcd.endpoints, cluster_name, tmp_path / "b")
    view = await again.open()
    assert [each.incarnation for each in view.nodes] == [node]
    await again.close()


async def test_a_lease_that_is_on_its_way_is_not_taken_for_lost(
    etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    store = store_on(etcd.endpoints, cluster_name, tmp_path / "a", nodes_every_s=0.001)
    await store.open()
    # All in one transaction, which has to wait until every lease is granted.
    claims = [NodeClaim(NodeId(f"n{n}"), "boot", f"nonce-{n}", "127.0.0.1:1") for n in range(40)]
    await committed(store, *map(JoinNode, claims))
    leases = dict(store._state.leases)
    await asyncio.sleep(1)
    assert len(leases) == len(claims)
    assert store._state.leases == leases
    # None to bind a node anew.
    assert store._head.transaction == 2
    await store.close()
