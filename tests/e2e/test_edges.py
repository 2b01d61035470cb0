"""Several edges as real processes: any serves any user, and losing one costs a reconnect.

The tests share one cluster with three edges and two nodes; each has users of its own.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from steward import Client
from steward.testing.local_cluster import LocalCluster, free_ports, is_running
from steward.testing.tab import Tab, TabClosed, many_sockets, open_tab, resume_tab
from steward.testing.waiting import eventually

pytestmark = pytest.mark.asyncio

SOON_S = 20.0
RUN_S = 40.0

TokenOf = Callable[[LocalCluster, str], str]


@pytest.fixture(scope="module")
def running(start_shared: Any) -> LocalCluster:
    cluster: LocalCluster = start_shared(edges=3)
    return cluster


@pytest.fixture
def cluster(running: LocalCluster, clusters_to_show: list[LocalCluster]) -> LocalCluster:
    clusters_to_show.append(running)
    running.wait_healed()
    return running


def edge_at(cluster: LocalCluster, url: str) -> str:
    """The id of the edge that listens there."""
    address = url.removeprefix("http://")
    return next(name for name, entry in cluster.processes.items() if entry["http"] == address)


async def ended(cluster: LocalCluster, edge: str, number: signal.Signals) -> None:
    """Signal an edge and return when the process is gone."""
    pid = await asyncio.to_thread(cluster.kill, edge, number)
    await eventually(lambda: not is_running(pid), f"{edge} has ended", SOON_S)


async def test_any_edge_serves_any_user_and_all_show_the_same_bytes(
    cluster: LocalCluster, token_of: TokenOf
) -> None:
    token = token_of(cluster, "everywhere")
    async with many_sockets() as http:
        tabs = [await open_tab(http, url, token) for url in cluster.urls]
        assert len({(t.ready["stream_id"], t.ready["manager"]["epoch"]) for t in tabs}) == 1
        for number, tab in enumerate(tabs):
            end = await tab.ask(f"m{number}", "20 1", RUN_S, agent="counter")
            assert end["data"]["outcome"] == "success"
        for tab in tabs:
            await tab.until_sequence(tabs[-1].sequence, SOON_S)
            assert tab.texts == tabs[-1].texts
            assert tab.findings() == []
        # The same message at another edge is the same message.
        await tabs[2].send("m0", "20 1", agent="counter")
        again = await tabs[2].until("accepted", SOON_S, id="m0")
        assert again["duplicate"]
        for tab in tabs:
            await tab.close()


async def test_a_client_id_lives_at_one_edge_only(cluster: LocalCluster, token_of: TokenOf) -> None:
    token = token_of(cluster, "taken-over")
    one, two, three = cluster.urls
    async with many_sockets() as http:
        old = await open_tab(http, one, token, client="tab-1")
        watching = await open_tab(http, one, token, client="tab-2")
        await old.send("m1", "50 20", agent="counter")
        await watching.until("agent_text", SOON_S)
        new = await open_tab(http, two, token, client="tab-1", after=0)
        assert await old.until_closed(SOON_S) == 4504
        await new.until("agent_completed", RUN_S)
        await watching.until("agent_completed", RUN_S)
        assert new.texts == watching.texts
        assert new.findings() == []
        assert old.texts == new.texts[: len(old.texts)]
        # All at once, again and again: exactly one of three lives each time.
        for n in range(4):
            trio = await asyncio.gather(
                *(open_tab(http, url, token, client=f"race-{n}") for url in (one, two, three))
            )
            assert sorted(await asyncio.gather(*map(alive_or_code, trio)), key=str) == [
                4504,
                4504,
                "alive",
            ]
            for tab in trio:
                await tab.close()
        await watching.close()
        await new.close()


async def alive_or_code(tab: Tab) -> Any:
    """`"alive"`, or the close code. One that was replaced is closed at once."""
    try:
        for number in range(3):
            await tab.socket.send_json({"type": "ping", "t": number})
            await tab.until("pong", SOON_S)
            await asyncio.sleep(0.3)
    except (TabClosed, aiohttp.ClientConnectionError):
        return tab.socket.close_code
    return "alive"


async def test_an_edge_that_stops_says_so_delivers_and_closes(
    cluster: LocalCluster, token_of: TokenOf
) -> None:
    token = token_of(cluster, "sent-away")
    url, other = cluster.urls[:2]
    async with many_sockets() as http:
        tab = await open_tab(http, url, token)
        seen = await open_tab(http, other, token)
        await tab.send("m1", "250 10", agent="counter")
        await tab.until("agent_text", SOON_S)
        stopping = asyncio.ensure_future(ended(cluster, edge_at(cluster, url), signal.SIGTERM))
        away = await tab.until("going_away", SOON_S)
        assert away["reconnect_after_ms"] >= 0
        assert await tab.until_closed(SOON_S) == 4002
        assert tab.frames[-1]["type"] != "error"
        before = len(tab.events)
        await stopping
        # What it had shown is whole, and the rest is elsewhere.
        resumed = await resume_tab(http, other, token, tab)
        assert resumed.ready["resume"] == "resumed"
        await resumed.until("agent_completed", RUN_S)
        await seen.until("agent_completed", RUN_S)
        assert resumed.texts == seen.texts and 0 < before < len(seen.texts)
        assert resumed.findings() == []
        await resumed.close()
        await seen.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_sdk_goes_on_at_another_edge(
    cluster: LocalCluster, token_of: TokenOf, number: signal.Signals
) -> None:
    token = token_of(cluster, f"sdk-{number.name}")
    opened: list[Any] = []
    problems: list[Any] = []
    client = Client(
        cluster.urls,
        token=token,
        client_id="tab-1",
        after=0,
        on_opened=opened.append,
        on_problem=problems.append,
    )
    async with client:
        run = await client.ask("150 20", agent="counter")
        events: list[Any] = []
        async for event in run:
            events.append(event)
            if len(events) == 20:
                first = edge_at(cluster, cluster.urls[0])
                killed = asyncio.ensure_future(ended(cluster, first, number))
        await killed
    sequences = [event.sequence for event in events]
    assert sequences == list(range(sequences[0], sequences[0] + len(events)))
    assert events[-1].type == "agent_completed" and events[-1].data["outcome"] == "success"
    said = "".join(event.data["delta"] for event in events if event.type == "agent_text")
    assert said == "".join(f"{n} " for n in range(150)), "nothing twice, nothing missing"
    assert len(opened) == 2 and not problems


@asynccontextmanager
async def another_edge(cluster: LocalCluster, **settings: Any) -> AsyncIterator[str]:
    """One more edge beside those of `up`, with settings of its own; its URL."""
    entries = cluster.processes
    port, ops = free_ports(1), free_ports(1)
    command = (
        *(sys.executable, "-P", "-m", "edge", "--id", "edge-x", "--data", str(cluster.data)),
        *("--port", str(port), "--ops-port", str(ops), "--parent-pid", str(os.getpid())),
        *("--registry", entries["registry"]["grpc"], "--auth", entries["auth"]["grpc"]),
        *(word for name, value in settings.items() for word in (f"--{name}", str(value))),
    )
    quiet = subprocess.DEVNULL
    edge = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as http:
            await eventually(lambda: ready(http, url), "the edge is ready", SOON_S)
        yield url
    finally:
        edge.kill()
        await edge.wait()


async def ready(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(f"{url}/readyz") as answer:
            return answer.status == 200
    except aiohttp.ClientConnectionError:
        return False


async def test_an_old_connection_is_told_to_come_again(
    cluster: LocalCluster, token_of: TokenOf
) -> None:
    token = token_of(cluster, "aged")
    async with (
        another_edge(cluster, **{"max-connection-age-s": 2}) as url,
        many_sockets() as http,
    ):
        tab = await open_tab(http, url, token)
        await tab.send("m1", "200 20", agent="counter")
        away = await tab.until("going_away", SOON_S)
        assert away["reconnect_after_ms"] >= 0
        assert await tab.until_closed(SOON_S) == 4008
        tab = await resume_tab(http, url, token, tab)
        while tab.events[-1]["type"] != "agent_completed":
            try:
                await tab.read(RUN_S)
            except TabClosed as closed:
                assert closed.code == 4008
                tab = await resume_tab(http, url, token, tab)
        assert tab.events[-1]["data"]["outcome"] == "success"
        assert tab.findings() == []
        await tab.close()


async def test_a_stopped_node_is_left_and_all_edges_stay_ready(
    cluster: LocalCluster, token_of: TokenOf
) -> None:
    token = token_of(cluster, "left-it")
    async with many_sockets() as http:
        tab = await open_tab(http, cluster.urls[1], token, after=0)
        before = tab.ready["manager"]
        await tab.send("m1", "5000 20", agent="counter")
        await tab.until("agent_text", SOON_S)
        await asyncio.to_thread(cluster.kill, before["node_id"], signal.SIGSTOP)
        try:
            moved = await tab.until("manager_moved", SOON_S)
            assert moved["epoch"] > before["epoch"]
            # The streams to the stopped node are open and carry nothing: they don't count.
            for url in cluster.urls:
                await eventually(lambda url=url: ready(http, url), f"{url} is ready", SOON_S)
            await tab.until("agent_text", SOON_S)
            await tab.socket.send_json({"type": "cancel", "thread_id": "main"})
            end = await tab.until("agent_completed", RUN_S)
            assert end["data"]["outcome"] == "cancelled"
        finally:
            await asyncio.to_thread(cluster.kill, before["node_id"], signal.SIGCONT)
        assert tab.findings() == []
        await tab.close()
