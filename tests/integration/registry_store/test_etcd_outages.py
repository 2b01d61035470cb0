"""Outages of a real etcd under load: nothing acknowledged is lost, and service comes back alone."""

import asyncio
import json
import signal
import subprocess
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from registry_service.core.transactions import JoinNode, NodeClaim
from registry_service.store.etcd_standby import LEADER_TTL_S
from steward.model.keys import NodeId
from steward.testing.etcd import EtcdCluster
from steward.testing.etcd_life import Life, committed, join, store_on
from steward.testing.proxy import CutProxy
from steward.testing.waiting import eventually

pytestmark = pytest.mark.asyncio

PAUSE_S = 15.0


async def check_after(life: Life, endpoints: tuple[str, ...], name: str, home: Path) -> None:
    """By a registry on another machine, which has only what is in etcd."""
    store = store_on(endpoints, name, home)
    await store.open()
    try:
        await life.check(store)
    finally:
        await store.close()


async def test_the_leader_of_etcd_is_killed(
    own_etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    life = Life(own_etcd.endpoints, cluster_name, tmp_path / "a")
    async with life:
        await life.serves()
        own_etcd.leader().kill()
        await life.serves()
    # An election, and not the end of this process.
    assert life.ended == []
    assert life.slowest_s < LEADER_TTL_S
    await check_after(life, own_etcd.endpoints, cluster_name, tmp_path / "b")


async def test_two_of_three_members_are_away_for_longer_than_a_lease(
    own_etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    life = Life(own_etcd.endpoints, cluster_name, tmp_path / "a")
    async with life:
        await life.serves()
        for member in own_etcd.members[:2]:
            member.kill()
        served = life.served
        await asyncio.sleep(LEADER_TTL_S + 2)
        # No majority, no answer; the registry has ended, as one that may lead no more.
        assert life.served - served < 50
        assert len(life.ended) == 1
        for member in own_etcd.members[:2]:
            own_etcd.restart(member)
        await life.serves(within_s=60)
    await check_after(life, own_etcd.endpoints, cluster_name, tmp_path / "b")


async def test_the_leader_of_etcd_stands_still_and_thaws(
    own_etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    """A thawed leader of 3.4.23 revokes leases that were renewed while it stood still."""
    life = Life(own_etcd.endpoints, cluster_name, tmp_path / "a")
    async with life:
        await life.serves()
        node = life.node
        frozen = own_etcd.leader()
        frozen.signal(signal.SIGSTOP)
        await life.serves()
        # Longer than the lease of the leader.
        await asyncio.sleep(PAUSE_S)
        assert life.ended == []
        frozen.signal(signal.SIGCONT)
        await asyncio.sleep(2)
        await life.serves()
        # The registry may have lost its lease by that, and has led anew; the node lives on.
        assert life.node == node
        assert all("no longer" in why for why in life.ended), life.ended
    await check_after(life, own_etcd.endpoints, cluster_name, tmp_path / "b")


async def test_etcd_loses_the_lease_of_the_registry_that_serves(
    etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    """What a thawed leader of 3.4.23 does now and then, here for certain."""
    life = Life(etcd.endpoints, cluster_name, tmp_path / "a")
    async with life:
        for times in range(1, 4):
            await life.serves()
            node, tenure = life.node, life.store._tenure
            assert tenure is not None
            await asyncio.to_thread(etcd.control, "lease", "revoke", f"{tenure.lease:x}")
            await eventually(lambda times=times: len(life.ended) == times, "it has ended")  # type: ignore[misc]
        await life.serves()
        assert life.node == node
    await check_after(life, etcd.endpoints, cluster_name, tmp_path / "b")


async def test_all_of_etcd_stands_still_and_thaws(
    own_etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    life = Life(own_etcd.endpoints, cluster_name, tmp_path / "a")
    async with life:
        await life.serves()
        for member in own_etcd.members:
            member.signal(signal.SIGSTOP)
        await asyncio.sleep(PAUSE_S)
        for member in own_etcd.members:
            member.signal(signal.SIGCONT)
        await life.serves()
        assert len(life.ended) == 1
    await check_after(life, own_etcd.endpoints, cluster_name, tmp_path / "b")


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
        life = Life(endpoints, cluster_name, tmp_path / "a")
        async with life:
            await life.serves()
            proxy.cut()
            await life.serves()
            await asyncio.sleep(LEADER_TTL_S + 1)
            await life.serves()
        assert life.ended == []
        proxy.mend()


async def test_a_full_quota_stops_new_placements_and_nothing_else(
    tmp_path: Path, cluster_name: str, own_etcd: EtcdCluster
) -> None:
    life = Life(own_etcd.endpoints, cluster_name, tmp_path / "a")
    async with life:
        await life.serves()
        for member in own_etcd.members:
            member.kill()
        quota = "--quota-backend-bytes=600000"
        for member in own_etcd.members:
            member.add_options(quota)
            own_etcd.restart(member)
        own_etcd.wait_healthy()
        while "NOSPACE" not in own_etcd.control("alarm", "list"):
            await asyncio.to_thread(_fill, own_etcd)
        ended = len(life.ended)
        served = life.served
        await asyncio.sleep(LEADER_TTL_S + 2)
        assert life.served - served < 50
        # It keeps its lease, and the store: only what must be written waits.
        assert len(life.ended) == ended
        own_etcd.control("del", "--prefix", "fill")
        _make_room(own_etcd)
        await life.serves()
    await check_after(life, own_etcd.endpoints, cluster_name, tmp_path / "b")


def _fill(etcd: EtcdCluster) -> None:
    try:
        for number in range(20):
            etcd.control("put", f"fill-{number}", "x" * 50_000)
    except subprocess.CalledProcessError as error:
        assert "space" in error.stderr, error.stderr


def _make_room(etcd: EtcdCluster) -> None:
    status = json.loads(etcd.control("endpoint", "status", "-w", "json"))
    revision = status[0]["Status"]["header"]["revision"]
    etcd.control("compact", str(revision))
    for endpoint in etcd.endpoints:
        etcd.control("defrag", endpoints=(endpoint,))
    etcd.control("alarm", "disarm")


async def test_a_lease_of_a_node_that_etcd_lost_is_made_again(
    etcd: EtcdCluster, cluster_name: str, tmp_path: Path
) -> None:
    store = store_on(etcd.endpoints, cluster_name, tmp_path / "a", nodes_every_s=0.2)
    await store.open()
    node = await join(store)
    lease = store._state.leases[node.node_id]
    etcd.control("lease", "revoke", f"{lease:x}")
    key = store._keys.node(node.node_id).decode()
    async with asyncio.timeout(10):
        while not etcd.control("get", key):
            await asyncio.sleep(0.05)
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
