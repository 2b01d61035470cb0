"""Several edges as real processes: any serves any user, and losing one costs a reconnect."""

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from steward import Client
from steward.client.checks import check_stream
from steward.testing.tab import open_tab

pytestmark = pytest.mark.asyncio

AGENT = '''
import asyncio

async def count(run):
    """Says a number every 20 ms."""
    await run.think("counting")
    for number in range(150):
        await run.say(f"{number} ")
        await asyncio.sleep(0.02)
    return "counted"
'''


async def two_edges(start_cluster: Any, tmp_path: Path) -> Any:
    agent = tmp_path / "count.py"
    agent.write_text(AGENT)
    return await asyncio.to_thread(
        lambda: start_cluster("--agent", f"{agent}:count", edges=2).wait_ready()
    )


async def test_a_client_id_lives_at_one_edge_and_all_edges_show_the_same(
    start_cluster: Any, tmp_path: Path
) -> None:
    cluster = await two_edges(start_cluster, tmp_path)
    token = await asyncio.to_thread(cluster.token, "alice")
    one, two = cluster.urls
    async with aiohttp.ClientSession() as http:
        old = await open_tab(http, one, token, client="tab-1")
        watching = await open_tab(http, one, token, client="tab-2")
        await old.send("m1", "go")
        await watching.until("agent_text", 10)
        new = await open_tab(http, two, token, client="tab-1", after=0)
        assert await old.until_closed(5) == 4504
        await new.until("agent_completed", 20)
        await watching.until("agent_completed", 20)
        assert new.texts == watching.texts and check_stream(new.events) == []
        # Both at once, again and again: exactly one of two lives each time.
        for n in range(5):
            pair = await asyncio.gather(
                open_tab(http, one, token, client=f"race-{n}"),
                open_tab(http, two, token, client=f"race-{n}"),
            )
            ends = [asyncio.ensure_future(tab.until_closed(5)) for tab in pair]
            done, alive = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            assert [end.result() for end in done] == [4504] and len(alive) == 1
            for end in alive:
                end.cancel()
            await asyncio.gather(*alive, return_exceptions=True)
            for tab in pair:
                await tab.close()


async def test_a_killed_edge_costs_a_reconnect_to_another_and_no_event(
    start_cluster: Any, tmp_path: Path
) -> None:
    cluster = await two_edges(start_cluster, tmp_path)
    token = await asyncio.to_thread(cluster.token, "alice")
    address = cluster.urls[0].removeprefix("http://")
    (first,) = (i for i, entry in cluster.processes.items() if entry["http"] == address)
    problems: list[str] = []
    async with Client(cluster.urls, token=token, client_id="tab-1", after=0) as client:
        run = await client.ask("go")
        events: list[Any] = []
        async for event in run:
            events.append(event)
            if len(events) == 20:
                killed_at = time.monotonic()
                await asyncio.to_thread(cluster.kill, first, signal.SIGKILL)
            elif len(events) == 21:
                print(f"next event after the kill: {(time.monotonic() - killed_at) * 1000:.0f} ms")
        sequences = [event.sequence for event in events]
        assert sequences == list(range(sequences[0], sequences[0] + len(events)))
        assert events[-1].type == "agent_completed" and not problems
        assert events[-1].data["outcome"] == "success", "the run never noticed"
    await asyncio.to_thread(cluster.wait_healed)


async def test_a_stopped_node_is_left_and_edges_stay_ready(
    start_cluster: Any, tmp_path: Path
) -> None:
    cluster = await two_edges(start_cluster, tmp_path)
    started = time.monotonic()
    token = await asyncio.to_thread(cluster.token, "alice")
    async with aiohttp.ClientSession() as http:
        tab = await open_tab(http, cluster.urls[1], token, after=0)
        before = tab.ready["manager"]
        # A registry that has just begun believes no silence for the time of a lease.
        while time.monotonic() - started < 6:
            await tab.ask(f"warm-{time.monotonic()}", "go", 20)
        await tab.send("m1", "go")
        for _ in range(10):
            await tab.until("agent_text", 10)
        stopped_at = time.monotonic()
        pid = await asyncio.to_thread(cluster.kill, before["node_id"], signal.SIGSTOP)
        try:
            moved = await tab.until("manager_moved", 10)
            print(f"next event after the stop: {(tab.at[-1] - stopped_at) * 1000:.0f} ms")
            assert moved["epoch"] > before["epoch"]
            assert tab.at[-1] - stopped_at < 3
            for url in cluster.urls:
                async with http.get(f"{url}/readyz") as answer:
                    assert answer.status == 200, await answer.text()
            await tab.until("agent_completed", 20)
        finally:
            await asyncio.to_thread(cluster.kill, before["node_id"], signal.SIGCONT)
        assert pid
        assert [e["sequence"] for e in tab.events] == list(range(1, len(tab.events) + 1))
        assert check_stream(tab.events) == []
        await tab.close()
