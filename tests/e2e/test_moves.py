"""Planned moves, and what is not planned but nobody waits at: one user, one node, all nodes.

The tests share one cluster with three nodes and two edges. Each has users of its own, and
leaves every process running and no node drained.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from steward.cli.cluster_file import CLUSTER_NAME
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.testing.local_cluster import LocalCluster, free_ports, is_running
from steward.testing.tab import Tab, many_sockets, open_tab
from steward.testing.waiting import eventually
from steward.testing.witness import enough
from steward.v1 import registry_service_pb2 as pb
from steward.v1 import registry_service_pb2_grpc
from steward.v1.placement_pb2 import UserKey

pytestmark = pytest.mark.asyncio

SOON_S = 20.0
RUN_S = 40.0

TokenOf = Callable[[LocalCluster, str], str]
RefusalsOf = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def running(start_shared: Any) -> LocalCluster:
    cluster: LocalCluster = start_shared("--agents", "3", edges=2)
    return cluster


@pytest.fixture
def cluster(running: LocalCluster, clusters_to_show: list[LocalCluster]) -> LocalCluster:
    clusters_to_show.append(running)
    return running


async def steward(cluster: LocalCluster, command: str, *words: str) -> Any:
    """Run a command that has to succeed, while the sockets go on; what it printed."""
    return (await asyncio.to_thread(cluster.steward, command, *words)).stdout


async def refused(cluster: LocalCluster, command: str, *words: str) -> str:
    """Run a command that has to fail with one line of text, which is returned."""
    answer = await asyncio.to_thread(cluster.try_steward, command, *words)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert answer.stdout == "" and answer.stderr.count("\n") == 1, answer.stderr
    assert answer.stderr.startswith("steward: ")
    return str(answer.stderr)


async def where(cluster: LocalCluster, user: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await steward(cluster, "where", user, "--json"))
    return found


async def nodes(cluster: LocalCluster) -> dict[str, dict[str, Any]]:
    """The nodes that the registry knows, by id. Not every process needs to be ready."""
    answer = await asyncio.to_thread(cluster.try_steward, "status", "--json")
    return {node["node_id"]: node for node in json.loads(answer.stdout)["nodes"]}


def done(file: Path) -> list[tuple[int, int]]:
    """(epoch, number) of the tool calls that were really started, in that order."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [(int(epoch), int(number)) for epoch, number in map(str.split, lines)]


def of_type(tab: Tab, kind: str) -> list[dict[str, Any]]:
    return [event for event in tab.events if event["type"] == kind]


def frames(tab: Tab, kind: str) -> list[dict[str, Any]]:
    return [frame for frame in tab.frames if frame["type"] == kind]


async def test_a_move_of_a_run_is_one_event_and_each_tool_runs_once(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    file = tmp_path / "done"
    async with many_sockets() as http:
        tab = await open_tab(http, cluster.url, token_of(cluster, "mover"))
        before = tab.ready["manager"]
        await tab.send("m1", f"{file} 150", agent="worker")
        await tab.until("tool_completed", RUN_S)
        said = await steward(cluster, "move", "mover")
        moved = await tab.until("manager_moved", SOON_S)
        await tab.until("tool_completed", RUN_S)
        enough(file)
        end = await tab.until("agent_completed", RUN_S)

        assert end["data"]["outcome"] == "success"
        calls = len(done(file))
        assert [number for _, number in done(file)] == list(range(calls)), "each once, in order"
        first, second = sorted({epoch for epoch, _ in done(file)})
        assert (first, second) == (before["epoch"], moved["epoch"])
        assert len(of_type(tab, "tool_completed")) == calls
        assert all(event["data"]["success"] for event in of_type(tab, "tool_completed"))

        assert [event["data"]["cause"] for event in of_type(tab, "manager_moved")] == ["handoff"]
        assert moved["data"]["from_node"] == before["node_id"]
        assert moved["data"]["to_node"] != before["node_id"]
        assert moved["data"]["gap_ms"] >= 0
        assert f"{before['node_id']} -> {moved['data']['to_node']} epoch {moved['epoch']}" in said
        assert len(frames(tab, "ready")) == 1, "the socket never noticed"
        assert tab.findings() == []

        found = await where(cluster, "mover")
        assert found["node_id"] == moved["data"]["to_node"]
        assert found["epoch"] == moved["epoch"] and found["node_alive"]
        assert found["sequence"] == tab.sequence
        await tab.close()


async def test_what_is_sent_during_a_move_is_accepted_once(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    async with many_sockets() as http:
        tab = await open_tab(http, cluster.url, token_of(cluster, "sender"))
        # The tool call holds the handoff up, so that messages come before, during and after it.
        file = tmp_path / "done"
        await tab.send("first", f"{file} 400", agent="worker")
        await tab.until("tool_executing", SOON_S)
        moving = asyncio.ensure_future(steward(cluster, "move", "sender"))
        ids: list[str] = []
        after = 0
        while after < 5:
            after += moving.done()
            ids.append(f"m{len(ids)}")
            await tab.send(ids[-1], "2 1", agent="counter", thread_id=f"t{len(ids) % 4}")
            await asyncio.sleep(0.05)
            assert len(ids) < 500
        assert moving.result()
        enough(file)
        while len(frames(tab, "accepted")) < len(ids) + 1:
            await tab.read(SOON_S)
        while len(of_type(tab, "agent_completed")) < len(ids) + 1:
            await tab.read(RUN_S)

        accepted = {frame["id"]: frame for frame in frames(tab, "accepted")}
        assert set(accepted) == {"first", *ids}
        assert not any(frame["duplicate"] for frame in accepted.values())
        assert not frames(tab, "error")
        asked = [event["data"]["id"] for event in of_type(tab, "user_message")]
        assert sorted(asked) == sorted(["first", *ids])
        assert {e["data"]["outcome"] for e in of_type(tab, "agent_completed")} == {"success"}
        kinds = [event["type"] for event in tab.events]
        assert kinds.count("manager_moved") == 1
        moved = kinds.index("manager_moved")
        assert "user_message" in kinds[1:moved] and "user_message" in kinds[moved:]

        # The new manager knows what the old one took.
        await tab.send("m0", "2 1", agent="counter", thread_id="t1")
        again = await tab.until("accepted", SOON_S)
        assert again["duplicate"] and again["run_id"] == accepted["m0"]["run_id"]
        assert tab.findings() == []
        await tab.close()


async def test_a_drained_node_is_empty_and_its_users_went_on(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    users = [f"drained-{number}" for number in range(10)]
    async with many_sockets() as http:
        tabs = {
            user: await open_tab(http, cluster.urls[index % 2], token_of(cluster, user))
            for index, user in enumerate(users)
        }
        homes = [tab.ready["manager"]["node_id"] for tab in tabs.values()]
        node = max(set(homes), key=homes.count)
        node_rev = (await nodes(cluster))[node]["node_rev"]
        there = [tab for tab in tabs.values() if tab.ready["manager"]["node_id"] == node]
        for user, tab in tabs.items():
            await tab.send("m1", f"{tmp_path / user} 150", agent="worker")
        for tab in tabs.values():
            await tab.until("tool_executing", SOON_S)

        assert f"{node} is drained" in await steward(cluster, "drain", node)
        status = (await nodes(cluster))[node]
        assert status["draining"] and status["node_rev"] == node_rev
        await eventually(lambda: no_managers(cluster, node), f"{node} is empty", SOON_S)

        stays = next(user for user in users if tabs[user] not in there)
        assert "NODE_DRAINING" in await refused(cluster, "move", stays, node)

        for user, tab in tabs.items():
            enough(tmp_path / user)
            end = await tab.until("agent_completed", RUN_S)
            assert end["data"]["outcome"] == "success"
            causes = [event["data"]["cause"] for event in of_type(tab, "manager_moved")]
            assert causes == (["handoff"] if tab in there else []), user
            assert_once_each(tmp_path / user)
            assert len(frames(tab, "ready")) == 1
            assert tab.findings() == []
            await tab.close()

        # A new process under its name takes users again.
        await restarted(cluster, node, signal.SIGTERM, node_rev)
        assert not (await nodes(cluster))[node]["draining"]
        assert f"-> {node} " in await steward(cluster, "move", stays, node)


async def no_managers(cluster: LocalCluster, node: str) -> bool:
    return bool((await nodes(cluster))[node]["managers"] == 0)


def assert_once_each(file: Path) -> None:
    """Every tool call was made once, in order, and there were some."""
    numbers = [number for _, number in done(file)]
    assert numbers and numbers == list(range(len(numbers)))


async def restarted(
    cluster: LocalCluster, node: str, number: signal.Signals, node_rev: int
) -> None:
    """Signal a node, and return when `up` has started it again under a new incarnation."""
    pid = await asyncio.to_thread(cluster.kill, node, number)
    await eventually(lambda: not is_running(pid), f"{node} has ended", RUN_S)
    await eventually(lambda: cluster.processes[node]["pid"] != pid, f"{node} is new", RUN_S)
    await asyncio.to_thread(cluster.wait_healed)
    assert (await nodes(cluster))[node]["node_rev"] > node_rev


async def test_sigterm_of_a_node_is_a_drain(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    async with many_sockets() as http:
        tab = await open_tab(http, cluster.url, token_of(cluster, "term"))
        node = tab.ready["manager"]["node_id"]
        node_rev = (await nodes(cluster))[node]["node_rev"]
        file = tmp_path / "done"
        await tab.send("m1", f"{file} 150", agent="worker")
        await tab.until("tool_executing", SOON_S)
        await restarted(cluster, node, signal.SIGTERM, node_rev)
        enough(file)
        end = await tab.until("agent_completed", RUN_S)
        assert end["data"]["outcome"] == "success"
        assert [event["data"]["cause"] for event in of_type(tab, "manager_moved")] == ["handoff"]
        assert_once_each(file)
        assert len({epoch for epoch, _ in done(file)}) == 2
        assert len(frames(tab, "ready")) == 1
        assert tab.findings() == []
        await tab.close()


async def test_an_evicted_user_is_out_at_every_edge_and_may_come_again(
    cluster: LocalCluster, token_of: TokenOf
) -> None:
    token = token_of(cluster, "evicted")
    async with many_sockets() as http:
        tabs = [await open_tab(http, url, token) for url in cluster.urls]
        other = await open_tab(http, cluster.url, token_of(cluster, "not-evicted"))
        epoch = tabs[0].ready["manager"]["epoch"]
        await tabs[0].send("m1", "1000 20", agent="counter")
        await tabs[1].until("agent_text", SOON_S)
        said = await steward(cluster, "evict", "evicted")
        assert said == f"default/evicted evicted: epoch {epoch} is over\n"
        for tab in tabs:
            assert await tab.until_closed(SOON_S) == 4503
        assert "nowhere" in await refused(cluster, "where", "evicted")
        assert "NOT_FOUND" in await refused(cluster, "evict", "evicted")

        again = await open_tab(http, cluster.urls[1], token, after=0)
        assert again.ready["manager"]["epoch"] > epoch
        assert again.ready["resume"] == "resumed"
        assert again.ready["stream_id"] == tabs[0].ready["stream_id"]
        end = await again.until("agent_completed", SOON_S)
        assert end["data"]["outcome"] == "cancelled"
        assert again.texts[: len(tabs[0].texts)] == tabs[0].texts
        end = await again.ask("m2", "3 1", SOON_S, agent="counter")
        assert end["data"]["outcome"] == "success"
        assert again.findings() == []

        end = await other.ask("m1", "3 1", SOON_S, agent="counter")
        assert end["data"]["outcome"] == "success", "nobody else noticed"
        await other.close()
        await again.close()


async def test_a_run_that_nobody_watches_survives_the_kill_of_its_node(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    file = tmp_path / "done"
    token = token_of(cluster, "absent")
    async with many_sockets() as http:
        tab = await open_tab(http, cluster.url, token)
        node = tab.ready["manager"]["node_id"]
        node_rev = (await nodes(cluster))[node]["node_rev"]
        await tab.send("m1", f"{file} 150", agent="worker")
        await tab.until("tool_completed", SOON_S)
        await tab.close()
        await eventually(
            lambda: asyncio.to_thread(no_users, cluster), "no edge has a user any more", SOON_S
        )
        await restarted(cluster, node, signal.SIGKILL, node_rev)
        # Nobody asks for this user; the other nodes find the open run. At the latest after 60 s.
        await eventually(lambda: len({epoch for epoch, _ in done(file)}) == 2, "it goes on", 70)
        enough(file)
        await eventually(Path(f"{file}.ended").exists, "it has done all", SOON_S)

        numbers = [number for _, number in done(file)]
        calls = len(set(numbers))
        assert sorted(set(numbers)) == list(range(calls))
        assert len(numbers) <= calls + 1, "only the call that the kill cut short may run twice"
        again = await open_tab(http, cluster.urls[1], token, after=0)
        end = await again.until("agent_completed", RUN_S)
        assert end["data"]["outcome"] == "success"
        assert len(of_type(again, "agent_started")) == 1
        assert len(of_type(again, "agent_completed")) == 1
        assert len(of_type(again, "tool_completed")) == calls
        assert again.findings() == []
        await again.close()


def no_users(cluster: LocalCluster) -> bool:
    return cluster.metric("steward_edge_users", "edge-0", "edge-1") == 0


# What is refused changes nothing.


async def facts(cluster: LocalCluster, user: str = "settled") -> Any:
    """What no refusal may change: incarnations, drains, processes, and where a user is."""
    answer = await asyncio.to_thread(cluster.try_steward, "status", "--json")
    assert answer.returncode == 0, answer.stderr
    status = json.loads(answer.stdout)
    members = [(node["node_id"], node["node_rev"], node["draining"]) for node in status["nodes"]]
    pids = [process["pid"] for process in status["processes"]]
    place = await where(cluster, user)
    # Of somebody who does not read while the commands run: it may be gone at the end.
    del place["connections"], place["connections_by_edge"]
    return members, pids, place


REFUSED_COMMANDS = (
    (("move", "nobody"), "NOT_FOUND: user default/nobody is on no node"),
    (("evict", "nobody"), "NOT_FOUND: user default/nobody is on no node"),
    (("where", "nobody"), "default/nobody is nowhere"),
    (("move", "settled", "node-9"), "NOT_FOUND: there is no node 'node-9'"),
    (("drain", "node-9"), "NOT_FOUND: there is no node 'node-9'"),
    (("drain", "node-9", "--now"), "NOT_FOUND: there is no node 'node-9'"),
    (("move", "bad\nname"), "PROTOCOL_VIOLATION: user_id must have 1 to 128 printable"),
    (("move", "settled", "x" * 129), "PROTOCOL_VIOLATION: node_id must have 1 to 128"),
    (("evict", "settled", "--tenant", "a\tb"), "PROTOCOL_VIOLATION: tenant_id must have"),
    (("drain", ""), "PROTOCOL_VIOLATION: node_id must have 1 to 128 printable"),
)


async def test_commands_for_what_is_not_there_say_so_and_change_nothing(
    cluster: LocalCluster, token_of: TokenOf
) -> None:
    async with many_sockets() as http:
        async with await open_tab(http, cluster.url, token_of(cluster, "settled")):
            before = await facts(cluster)
            for command, says in REFUSED_COMMANDS:
                assert says in await refused(cluster, *command), command
            assert await facts(cluster) == before


async def test_only_an_operator_may_operate(cluster: LocalCluster, token_of: TokenOf) -> None:
    key = load_or_create_key(cluster.data, CONTROL_KEY)
    user = UserKey(tenant_id="default", user_id="settled")
    async with (
        many_sockets() as http,
        await open_tab(http, cluster.url, token_of(cluster, "settled")),
        make_channel(cluster.processes["registry"]["grpc"]) as channel,
    ):
        before = await facts(cluster)
        stub = registry_service_pb2_grpc.RegistryServiceStub(channel)
        calls = (
            (stub.DrainNode, pb.DrainNodeRequest(node_id="node-0")),
            (stub.FenceNode, pb.FenceNodeRequest(node_id="node-0", cause="no")),
            (stub.MoveUser, pb.MoveUserRequest(user=user)),
            (stub.EvictUser, pb.EvictUserRequest(user=user)),
            (stub.ReportDeath, pb.ReportDeathRequest(node_id="node-0", pid=1)),
            (stub.DescribeCluster, pb.DescribeClusterRequest()),
            (stub.CountConnections, pb.CountConnectionsRequest(users=[user])),
            (stub.ListViolations, pb.ListViolationsRequest(limit=1)),
        )
        roles = [role for role in Role if role is not Role.OPERATOR]
        assert Role.EDGE in roles and Role.AGENT in roles
        for role in roles:
            metadata = call_metadata(RoleCredentials(key, role, CLUSTER_NAME, "somebody"))
            for call, request in calls:
                with pytest.raises(grpc.aio.AioRpcError) as answer:
                    await call(request, metadata=metadata, timeout=10)
                assert answer.value.code() is grpc.StatusCode.PERMISSION_DENIED, (role, request)
        assert await facts(cluster) == before


@pytest.mark.parametrize(
    ("options", "says", "kind"),
    [
        (("--id", "node-x", "--cluster", "other"), "this is cluster 'steward'", "wrong_cluster"),
        (("--id", "node-1"), "the name is in use by a node that lives", "node_id_in_use"),
    ],
    ids=["wrong cluster", "name in use"],
)
async def test_a_node_that_may_not_join_says_why_and_changes_nothing(
    cluster: LocalCluster,
    token_of: TokenOf,
    refusals_of: RefusalsOf,
    options: tuple[str, ...],
    says: str,
    kind: str,
) -> None:
    entries = cluster.processes
    ops = free_ports(1)
    command = (
        *(sys.executable, "-P", "-m", "agent_service", *options),
        *("--data", str(cluster.data), "--ops-port", str(ops)),
        *("--registry", entries["registry"]["grpc"], "--log", entries["log"]["grpc"]),
        *("--parent-pid", str(os.getpid())),
    )
    async with (
        many_sockets() as http,
        await open_tab(http, cluster.url, token_of(cluster, "settled")),
    ):
        before = await facts(cluster)
        quiet = subprocess.DEVNULL
        node = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
        try:
            await eventually(lambda: answers(http, ops, says), f"/readyz says: {says}", SOON_S)
            assert node.returncode is None, "it tries again: the other one may end"
            await eventually(
                lambda: asyncio.to_thread(refusals_of, cluster, kind=kind), f"{kind} is on record"
            )
            assert await facts(cluster) == before
        finally:
            node.kill()
            await node.wait()


async def answers(http: aiohttp.ClientSession, ops: int, says: str) -> bool:
    """Whether a process is up, not ready, and gives this reason."""
    try:
        async with http.get(f"http://127.0.0.1:{ops}/readyz") as answer:
            return answer.status == 503 and says in await answer.text()
    except aiohttp.ClientConnectionError:
        return False
