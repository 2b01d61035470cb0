"""A killed node, seen from a socket: another epoch, no gap, no repeat, and soon."""

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from steward.client.checks import check_stream
from steward.testing.tab import open_tab

AGENT = '''
import asyncio

async def count(run):
    """Says a number every 20 ms, with a tool call in the middle that is slow."""
    await run.think("counting")
    for number in range(40):
        await run.say(f"{number} ")
        await asyncio.sleep(0.02)
    return "counted"
'''

BOUND_S = 8.0


def assert_unbroken(events: list[dict[str, Any]]) -> None:
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert check_stream(events) == []


@pytest.mark.asyncio
async def test_killed_node_user_moves_under_a_higher_epoch_without_gap_or_repeat(
    start_cluster: Any, tmp_path: Path
) -> None:
    agent = tmp_path / "count.py"
    agent.write_text(AGENT)
    cluster = await asyncio.to_thread(
        lambda: start_cluster("--agent", f"{agent}:count").wait_ready()
    )
    token = await asyncio.to_thread(cluster.token, "alice")
    async with aiohttp.ClientSession() as session:
        first = await open_tab(session, cluster.url, token)
        second = await open_tab(session, cluster.url, token)
        before = first.ready["manager"]
        await first.send("m1", "go")
        for _ in range(5):
            await first.until("agent_text", 10)
        killed_at = time.monotonic()
        await asyncio.to_thread(cluster.kill, before["node_id"], signal.SIGKILL)
        moved = await first.until("manager_moved", BOUND_S)
        gap_s = first.at[-1] - killed_at
        print(f"next event after the kill: {gap_s * 1000:.0f} ms; said {moved['data']}")
        ended = await first.until("agent_completed", BOUND_S)
        assert ended["data"]["outcome"] == "success"
        said = "".join(e["data"]["delta"] for e in first.events if e["type"] == "agent_text")
        assert said == "".join(f"{number} " for number in range(40))
        assert moved["epoch"] > before["epoch"]
        assert moved["data"]["from_node"] == before["node_id"]
        assert moved["data"]["to_node"] != before["node_id"]
        assert gap_s < BOUND_S

        await second.send("m2", "again")
        answer = await first.until("agent_completed", BOUND_S)
        assert answer["data"]["outcome"] == "success"
        while len(second.events) < len(first.events):
            await second.until("agent_completed", BOUND_S)
        assert second.events == first.events
        assert_unbroken(first.events)

        await first.close()
        await second.close()
        replayed = await open_tab(session, cluster.url, token, after=0)
        while len(replayed.events) < len(first.events):
            await replayed.until("agent_completed", 10)
        assert replayed.events == first.events
        await replayed.close()


@pytest.mark.asyncio
async def test_killed_node_queued_messages_run_on_the_other_node(
    start_cluster: Any, tmp_path: Path
) -> None:
    agent = tmp_path / "count.py"
    agent.write_text(AGENT)
    cluster = await asyncio.to_thread(
        lambda: start_cluster("--agent", f"{agent}:count").wait_ready()
    )
    token = await asyncio.to_thread(cluster.token, "bob")
    async with aiohttp.ClientSession() as session:
        tab = await open_tab(session, cluster.url, token)
        for number in range(3):
            await tab.send(f"m{number}", "go")
        await tab.until("agent_text", 10)
        await asyncio.to_thread(cluster.kill, tab.ready["manager"]["node_id"], signal.SIGKILL)
        outcomes = [(await tab.until("agent_completed", 15))["data"]["outcome"] for _ in range(3)]
        assert outcomes == ["success", "success", "success"]
        assert_unbroken(tab.events)
        await tab.close()
