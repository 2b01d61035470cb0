"""A node that was stopped and goes on: nothing of it is heard, stored or done, and it is on record.

The process is real and so is the stop (SIGSTOP): when it goes on it believes that it still
has its users, its agents run on from the line where they were, and its timers are due.
"""

import asyncio
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from steward.testing.local_cluster import LocalCluster, is_running
from steward.testing.tab import Tab, many_sockets, open_tab
from steward.testing.waiting import eventually
from steward.testing.witness import enough

pytestmark = pytest.mark.asyncio

LEASE_S = 3.0
SOON_S = 30.0

OF_A_ZOMBIE = {
    "node_stood_still",
    "stale_append",
    "stale_seal",
    "stale_delivery",
    "foreign_delivery",
    "foreign_release",
    "fenced_node_returned",
}

TokenOf = Callable[[LocalCluster, str], str]
RefusalsOf = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def running(start_shared: Any) -> LocalCluster:
    cluster: LocalCluster = start_shared(
        environ={"STEWARD_REGISTRY_TTL_MS": str(int(LEASE_S * 1000))}
    )
    return cluster


@pytest.fixture
def cluster(running: LocalCluster, clusters_to_show: list[LocalCluster]) -> LocalCluster:
    clusters_to_show.append(running)
    return running


async def incarnation(cluster: LocalCluster, node: str) -> int:
    """The incarnation of a node that the registry holds for alive; 0 when there is none."""
    answer = await asyncio.to_thread(cluster.try_steward, "status", "--json")
    members = json.loads(answer.stdout)["nodes"]
    return next((one["node_rev"] for one in members if one["node_id"] == node), 0)


async def busy_tab(
    http: aiohttp.ClientSession, cluster: LocalCluster, token: str, file: Path
) -> Tab:
    """A user with two runs in flight, one that speaks and one that uses tools."""
    tab = await open_tab(http, cluster.url, token)
    await tab.send("speak", "5000 10", agent="counter", thread_id="speak")
    await tab.send("work", f"{file} 100", agent="worker", thread_id="work")
    await tab.until("agent_text", SOON_S)
    await tab.until("tool_completed", SOON_S)
    return tab


def outcomes(tab: Tab) -> list[str]:
    return [e["data"]["outcome"] for e in tab.events if e["type"] == "agent_completed"]


@pytest.mark.parametrize("longer_than_its_lease", [True, False], ids=["long", "short"])
async def test_nothing_of_a_stopped_node_counts_when_it_goes_on(
    cluster: LocalCluster,
    token_of: TokenOf,
    refusals_of: RefusalsOf,
    tmp_path: Path,
    longer_than_its_lease: bool,
) -> None:
    await asyncio.to_thread(cluster.wait_healed)
    user = f"of-a-zombie-{longer_than_its_lease}"
    file = tmp_path / "done"
    async with many_sockets() as http:
        tab = await busy_tab(http, cluster, token_of(cluster, user), file)
        old = tab.ready["manager"]
        node = old["node_id"]
        node_rev = await incarnation(cluster, node)
        stopped_at = time.monotonic()
        pid = await asyncio.to_thread(cluster.kill, node, signal.SIGSTOP)
        try:
            moved = await tab.until("manager_moved", SOON_S)
            # Its user goes on elsewhere.
            await tab.until("tool_completed", SOON_S)
            while longer_than_its_lease and time.monotonic() < stopped_at + 1.5 * LEASE_S:
                await tab.read(SOON_S)
        finally:
            await asyncio.to_thread(cluster.kill, node, signal.SIGCONT)
        assert moved["epoch"] > old["epoch"] and moved["data"]["from_node"] == node
        tools_before = file.read_text().splitlines()

        # It ends by itself, and its name comes back as another incarnation.
        await eventually(lambda: not is_running(pid), "the zombie has ended", SOON_S)
        await asyncio.to_thread(cluster.wait_healed)
        assert await incarnation(cluster, node) > node_rev

        await tab.until("tool_completed", SOON_S)
        enough(file)
        await tab.until("agent_completed", SOON_S)
        await tab.socket.send_json({"type": "cancel", "thread_id": "speak"})
        await tab.until("agent_completed", SOON_S)
        assert outcomes(tab) == ["success", "cancelled"]
        # Not a byte of it came: every event is as the log has it, in one order of epochs.
        assert tab.findings() == []
        at = tab.events.index(moved)
        assert {event["epoch"] for event in tab.events[:at]} == {old["epoch"]}
        assert {event["epoch"] for event in tab.events[at:]} == {moved["epoch"]}
        assert sum(event["type"] == "manager_moved" for event in tab.events) == 1
        stored = await open_tab(http, cluster.url, token_of(cluster, user), after=0)
        await stored.until_sequence(tab.sequence, SOON_S)
        assert stored.texts == tab.texts
        await stored.close()
        await tab.close()

    # It started no tool after it went on, and no call was done twice but the one that was running.
    since = file.read_text().splitlines()[len(tools_before) :]
    assert since and all(line.startswith(f"{moved['epoch']} ") for line in since)
    numbers = [int(line.split()[1]) for line in [*tools_before, *since]]
    calls = len(set(numbers))
    assert sorted(set(numbers)) == list(range(calls)) and len(numbers) <= calls + 1

    # It is on record.
    def recorded() -> list[str]:
        of_node = refusals_of(cluster, node_id=node, node_rev=node_rev)
        return [one["kind"] for one in of_node if one["kind"] in OF_A_ZOMBIE]

    kinds = await eventually(lambda: asyncio.to_thread(recorded), "it is on record")
    print(f"recorded of {node}/{node_rev}: {kinds}")
    if longer_than_its_lease:
        assert "node_stood_still" in kinds
