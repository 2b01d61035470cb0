"""Old events go under people who are connected, and who come back: nobody hangs, nobody skips."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from steward.testing.local_cluster import LocalCluster
from steward.testing.tab import Tab, TabClosed, many_sockets, open_tab

pytestmark = pytest.mark.asyncio

SOON_S = 20.0
KEEP_S = 2.0

TokenOf = Callable[[LocalCluster, str], str]


@pytest.fixture(scope="module")
def running(start_shared: Any) -> LocalCluster:
    environ = {"STEWARD_LOG_KEEP_DAYS": str(KEEP_S / 86_400)}
    cluster: LocalCluster = start_shared("--agents", "1", "--edges", "1", environ=environ)
    return cluster


@pytest.fixture
def cluster(running: LocalCluster, clusters_to_show: list[LocalCluster]) -> LocalCluster:
    clusters_to_show.append(running)
    return running


async def removed(cluster: LocalCluster) -> float:
    name = "steward_log_compacted_events_total"
    return await asyncio.to_thread(cluster.metric, name, "log")


async def said(tab: Tab, number: int) -> None:
    """Ask for a run, and wait until it has ended and none of its events misses."""
    await tab.ask(f"m{number}", "3 1", SOON_S, agent="counter")
    assert tab.findings() == []


def sequences(tab: Tab) -> list[int]:
    return [event["sequence"] for event in tab.events]


async def forgotten(cluster: LocalCluster, tab: Tab, from_number: int) -> None:
    """Write and wait until the events of now are gone: all the time, the manager stays."""
    goal = await removed(cluster) + tab.sequence
    ends = time.monotonic() + 4 * SOON_S
    while await removed(cluster) < goal:
        assert time.monotonic() < ends, "old events go"
        from_number += 1
        await said(tab, from_number)
        await asyncio.sleep(0.2)


async def test_who_comes_back_behind_the_new_beginning_gets_a_reset_and_all_that_is_kept(
    cluster: LocalCluster, token_of: TokenOf
) -> None:
    token = token_of(cluster, "alice")
    async with many_sockets() as http, await open_tab(http, cluster.url, token) as tab:
        stream = tab.ready["stream_id"]
        await said(tab, 1)
        await forgotten(cluster, tab, 1)
        tries = 0
        while True:
            tries += 1
            assert tries <= 3, "one that was told too much is put right when it comes again"
            back = await open_tab(http, cluster.url, token, after=2, stream=stream)
            async with back:
                if back.ready["resume"] == "reset":
                    await back.until_sequence(tab.sequence, SOON_S)
                    assert sequences(back)[0] > 3
                    assert back.texts == tab.texts[-len(back.texts) :]
                    break
                with pytest.raises(TabClosed) as closed:
                    await back.until_sequence(tab.sequence, SOON_S)
                assert closed.value.code == 4006
        assert tries == 2, "this edge's manager was made before events went"
        # Who was connected has seen all of it, and goes on; so does who is not that far behind.
        await said(tab, 1000)
        near = tab.sequence - 2
        async with await open_tab(http, cluster.url, token, after=near, stream=stream) as other:
            assert other.ready["resume"] == "resumed"
            await other.until_sequence(tab.sequence, SOON_S)
            assert other.texts == tab.texts[-2:]
