"""Agent nodes as processes: one that was stopped for longer than its lease, and one that drains."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steward.client.checks import check_stream
from steward.testing.local_cluster import LocalCluster, is_running
from steward.testing.tab import open_tab
from steward.testing.waiting import wait_for

aiohttp = pytest.importorskip("aiohttp")

AGENT = '''
"""Counts, with a tool call in the middle, and notes which process ran the tool."""

import asyncio
import os
from pathlib import Path

NOTES = Path(__file__).with_name("notes")


async def count(run):
    async def work(n):
        with NOTES.open("a") as notes:
            notes.write(f"{os.getpid()} {n}\\n")
        await asyncio.sleep(0.1)
        return n

    await run.think("counting")
    for number in range(60):
        await run.say(f"{number} ")
        await asyncio.sleep(0.05)
        if number % 10 == 5:
            await run.tool("work", {"n": number}, work)
    return "counted"
'''
SAID = "".join(f"{number} " for number in range(60))
CALLS = [5, 15, 25, 35, 45, 55]
LEASE_S = 5.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    (tmp_path / "count.py").write_text(AGENT)
    found = LocalCluster.start(tmp_path, "--agent", f"{tmp_path / 'count.py'}:count")
    try:
        yield found.wait_ready()
    finally:
        found.end()


def notes(tmp_path: Path) -> list[tuple[int, int]]:
    """(process, call) of every tool that began, in order."""
    lines = (tmp_path / "notes").read_text().splitlines()
    return [(int(pid), int(call)) for pid, call in map(str.split, lines)]


def assert_told_once(events: list[dict[str, Any]]) -> None:
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert check_stream(events) == []
    said = "".join(e["data"]["delta"] for e in events if e["type"] == "agent_text")
    assert said == SAID
    assert events[-1]["data"]["outcome"] == "success"


@pytest.mark.asyncio
async def test_a_node_that_was_stopped_for_longer_than_its_lease_does_nothing_more_and_ends(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    # In the first lease after its start a registry fences nobody for being silent.
    await asyncio.sleep(LEASE_S)
    token = await asyncio.to_thread(cluster.token, "alice")
    async with aiohttp.ClientSession() as session:
        tab = await open_tab(session, cluster.url, token)
        await tab.send("m1", "go")
        await tab.until("tool_completed", 10)
        node = tab.ready["manager"]["node_id"]
        stopped_at = time.monotonic()
        pid = cluster.kill(node, signal.SIGSTOP)
        moved = await tab.until("manager_moved", 10)
        assert moved["data"]["cause"] == "failover"
        assert moved["data"]["from_node"] == node
        began_by_zombie = {call for who, call in notes(tmp_path) if who == pid}
        await asyncio.sleep(max(LEASE_S + 1.0 - (time.monotonic() - stopped_at), 0))
        os.kill(pid, signal.SIGCONT)
        woke_at = time.monotonic()
        await asyncio.to_thread(
            wait_for, lambda: not is_running(pid), 10, "the one that was stopped has ended"
        )
        print(f"ended {time.monotonic() - woke_at:.2f} s after it woke up")
        await tab.until("agent_completed", 15)
        assert_told_once(tab.events)
        assert {call for who, call in notes(tmp_path) if who == pid} == began_by_zombie
        await tab.close()
    log = (cluster.data / "logs" / f"{node}.log").read_text()
    assert "stood still" in log
    await asyncio.to_thread(cluster.wait_healed)
    answer = await asyncio.to_thread(cluster.try_steward, "violations", "--json")
    assert "node_stood_still" in answer.stdout, answer.stderr


@pytest.mark.asyncio
async def test_sigterm_is_a_drain_and_the_run_goes_on_without_a_pause_that_counts(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    token = await asyncio.to_thread(cluster.token, "alice")
    async with aiohttp.ClientSession() as session:
        tab = await open_tab(session, cluster.url, token)
        await tab.send("m1", "go")
        await tab.until("tool_completed", 10)
        node = tab.ready["manager"]["node_id"]
        pid = cluster.kill(node, signal.SIGTERM)
        moved = await tab.until("manager_moved", 10)
        print(f"said {moved['data']}")
        assert moved["data"]["cause"] == "handoff"
        assert moved["data"]["gap_ms"] < 1000
        await asyncio.to_thread(wait_for, lambda: not is_running(pid), 10, "it has ended")
        await tab.until("agent_completed", 15)
        assert_told_once(tab.events)
        # Nothing was cut: every call ran once, whichever process it was.
        assert [call for _, call in notes(tmp_path)] == CALLS
        await tab.close()
