"""A real node beside a real cluster, cut off from one peer at a time: what its users see."""

import asyncio
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from steward.cli.cluster_file import CLUSTER_NAME
from steward.client.checks import check_stream
from steward.model.keys import NodeId, UserKey
from steward.model.rendezvous import favourite
from steward.rpc.factory import make_channel
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.testing.local_cluster import LocalCluster, free_ports
from steward.testing.proxy import CutProxy
from steward.testing.tab import Tab, open_tab
from steward.testing.waiting import eventually
from steward.v1 import registry_service_pb2 as pb
from steward.v1.registry_service_pb2_grpc import RegistryServiceStub

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(120)]

AGENT = '''
"""Counts, slowly enough that a cut falls into it, and notes which process did, and when."""

import asyncio
import os
import time
from pathlib import Path

NOTES = Path(__file__).with_name("notes")


async def count(run):
    await run.think("counting")
    for number in range(200):
        with NOTES.open("a") as notes:
            notes.write(f"{os.getpid()} {time.monotonic()}\\n")
        await run.say(f"{number} ")
        await asyncio.sleep(0.05)
    return "counted"
'''
SAID = "".join(f"{number} " for number in range(200))
TTL_MS = 2000
FAR = NodeId("node-x")
USERS = [
    name
    for name in (f"user-{number}" for number in range(40))
    if favourite(UserKey("default", name), (NodeId("node-0"), FAR)) == FAR
]
"""Who belongs on the far node."""


class FarNode:
    """An agent node that reaches registry and log through proxies only."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        peers = cluster.processes
        self.registry = CutProxy(peers["registry"]["grpc"])
        self.log = CutProxy(peers["log"]["grpc"])
        self.ops_port = free_ports(1)
        self._cluster = cluster
        self._agent = f"{directory / 'count.py'}:count"
        self._output = directory / f"{FAR}-{self.ops_port}.log"

    async def start(self) -> None:
        await self.registry.open()
        await self.log.open()
        with self._output.open("w") as output:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "agent_service",
                *("--id", FAR, "--cluster", CLUSTER_NAME, "--data", str(self._cluster.data)),
                *("--registry", self.registry.address, "--log", self.log.address),
                *("--ops-port", str(self.ops_port), "--parent-pid", str(os.getpid())),
                *("--entrypoints", self._agent),
                stderr=output,
            )

    async def readyz(self) -> str:
        """What /readyz says; empty while nobody listens."""

        def get() -> str:
            url = f"http://127.0.0.1:{self.ops_port}/readyz"
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return str(answer.read().decode())
            except urllib.error.HTTPError as unready:
                return unready.read().decode()
            except OSError:
                return ""

        return await asyncio.to_thread(get)

    async def ready(self) -> None:
        async def is_ready() -> bool:
            return '"ready"' in await self.readyz()

        await eventually(is_ready, "the far node is ready", 20)

    async def exit_code(self, within_s: float = 15) -> int:
        return await asyncio.wait_for(self.process.wait(), within_s)

    def said(self) -> str:
        return self._output.read_text()

    async def close(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        await self.registry.close()
        await self.log.close()


@pytest_asyncio.fixture
async def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[LocalCluster]:
    """With one node of its own; a parameter names the strict tenants."""
    (tmp_path / "count.py").write_text(AGENT)
    strict = getattr(request, "param", "")
    found = LocalCluster.start(
        tmp_path,
        *("--agent", f"{tmp_path / 'count.py'}:count", "--agents", "1"),
        environ={
            "STEWARD_REGISTRY_TTL_MS": str(TTL_MS),
            "STEWARD_REGISTRY_STRICT_TENANTS": strict,
        },
    )
    try:
        await asyncio.to_thread(found.wait_ready)
        yield found
    finally:
        await asyncio.to_thread(found.end)


@pytest_asyncio.fixture
async def far(cluster: LocalCluster, tmp_path: Path) -> AsyncIterator[FarNode]:
    node = FarNode(cluster, tmp_path)
    await node.start()
    try:
        await node.ready()
        yield node
    finally:
        await node.close()


@asynccontextmanager
async def tab_on_far_node(cluster: LocalCluster) -> AsyncIterator[Tab]:
    """A user's tab, whose manager is on the far node and whose run has begun."""
    async with aiohttp.ClientSession() as session:
        for user in USERS:
            token = await asyncio.to_thread(cluster.token, user)
            tab = await open_tab(session, cluster.url, token)
            if tab.ready["manager"]["node_id"] == FAR:
                break
            # A node whose first beats were late is passed over; the next user tries again.
            await tab.close()
        assert tab.ready["manager"]["node_id"] == FAR
        await tab.send("m1", "go")
        for _ in range(5):
            await tab.until("agent_text", 10)
        yield tab
        await tab.close()


async def told_once(tab: Tab) -> None:
    """Read to the end of the run: one change of epoch, told once, nothing missing."""
    await tab.until("agent_completed", 40)
    events = tab.events
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert check_stream(events) == []
    assert len({event["epoch"] for event in events}) == 2
    assert "".join(e["data"]["delta"] for e in events if e["type"] == "agent_text") == SAID
    assert events[-1]["data"]["outcome"] == "success"


async def moved_once(tab: Tab) -> dict[str, Any]:
    """The same, and that the user was told of the move."""
    moved = await tab.until("manager_moved", 15)
    await told_once(tab)
    assert [event["type"] for event in tab.events].count("manager_moved") == 1
    assert moved["data"]["from_node"] == FAR
    assert moved["data"]["to_node"] == "node-0"
    return moved


async def test_a_node_cut_off_from_the_registry_alone_costs_its_users_one_epoch_change(
    cluster: LocalCluster, far: FarNode
) -> None:
    async with tab_on_far_node(cluster) as tab:
        far.registry.cut()
        began = time.monotonic()
        moved = await moved_once(tab)
        at = tab.at[tab.events.index(moved)] - began
        print(f"moved {at:.2f} s after the cut, gap {moved['data']['gap_ms']} ms")
        assert at < TTL_MS / 1000 + 3
    far.registry.mend()
    assert await far.exit_code() == 1
    assert "incarnation is over" in far.said()


@pytest.mark.parametrize("cluster", ["default"], indirect=True)
async def test_a_strict_tenants_agent_never_executes_on_two_nodes_at_once(
    cluster: LocalCluster, far: FarNode, tmp_path: Path
) -> None:
    async with tab_on_far_node(cluster) as tab:
        far.registry.cut()
        cut_at = time.monotonic()
        # The old manager let go in order, and yet nobody planned it: the next one tells.
        moved = await moved_once(tab)
    assert moved["data"]["cause"] == "failover"
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    there = [float(at) for pid, at in notes if int(pid) == far.process.pid]
    here = [float(at) for pid, at in notes if int(pid) != far.process.pid]
    print(f"ended there {max(there) - cut_at:.2f} s after the cut")
    print(f"began here {min(here) - cut_at:.2f} s after the cut")
    assert max(there) < cut_at + TTL_MS / 1000, "it stopped before its lease was over"
    assert max(there) < min(here)


async def test_a_node_cut_off_from_the_log_is_moved_away_from_and_ends(
    cluster: LocalCluster, far: FarNode
) -> None:
    async with tab_on_far_node(cluster) as tab:
        far.log.cut()
        began = time.monotonic()
        moved = await moved_once(tab)
        at = tab.at[tab.events.index(moved)] - began
        print(f"moved {at:.2f} s after the cut, gap {moved['data']['gap_ms']} ms")
        # A second until the node knows, two until the registry acts.
        assert 1 < at < 6
    assert await far.exit_code() == 1


async def test_a_node_whose_lease_is_taken_away_for_no_reason_ends_and_its_users_go_on(
    cluster: LocalCluster, far: FarNode
) -> None:
    key = load_or_create_key(cluster.data, CONTROL_KEY)
    operator = RoleCredentials(key, Role.OPERATOR, CLUSTER_NAME, "test")
    metadata = (("authorization", f"Bearer {operator.token()}"),)
    async with tab_on_far_node(cluster) as tab:
        async with make_channel(cluster.processes["registry"]["grpc"]) as channel:
            stub = RegistryServiceStub(channel)
            await stub.FenceNode(pb.FenceNodeRequest(node_id=FAR, cause="test"), metadata=metadata)
        assert await far.exit_code(5) == 1
        await moved_once(tab)


async def test_another_process_under_the_name_of_a_living_node_is_refused_and_disturbs_nobody(
    cluster: LocalCluster, far: FarNode, tmp_path: Path
) -> None:
    second = FarNode(cluster, tmp_path)
    async with tab_on_far_node(cluster) as tab:
        await second.start()
        try:

            async def is_refused() -> bool:
                return "in use" in await second.readyz()

            await eventually(is_refused, "the second one says why it is not ready", 20)
            await tab.until("agent_completed", 40)
            assert "manager_moved" not in {event["type"] for event in tab.events}
            violations = await asyncio.to_thread(cluster.steward, "violations", "--json")
            assert "node_id_in_use" in violations.stdout
            far.process.send_signal(signal.SIGKILL)
            await second.ready()
        finally:
            await second.close()


async def test_open_runs_end_after_everything_was_killed_though_nobody_is_connected(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    token = await asyncio.to_thread(cluster.token, USERS[0])
    async with aiohttp.ClientSession() as session:
        tab = await open_tab(session, cluster.url, token)
        await tab.send("m1", "go")
        for _ in range(5):
            await tab.until("agent_text", 10)
        await tab.close()
    await asyncio.to_thread(cluster.end)
    again = LocalCluster.start(
        tmp_path,
        *("--agent", f"{tmp_path / 'count.py'}:count", "--agents", "1"),
        data=cluster.data,
        environ={"STEWARD_REGISTRY_TTL_MS": str(TTL_MS)},
    )
    try:
        await asyncio.to_thread(again.wait_ready)
        began = time.monotonic()

        async def ended() -> bool:
            name = "steward_agent_runs_total"
            return await asyncio.to_thread(again.metric, name, "node-0") > 0

        await eventually(ended, "the run ends without anybody who asks", 40)
        print(f"ended {time.monotonic() - began:.1f} s after the start")
        async with aiohttp.ClientSession() as session:
            tab = await open_tab(session, again.url, token, after=0)
            await tab.until("agent_completed", 10)
            assert check_stream(tab.events) == []
            assert tab.events[-1]["data"]["outcome"] == "success"
            await tab.close()
    finally:
        await asyncio.to_thread(again.end)
