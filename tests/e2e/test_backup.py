"""A backup of a busy cluster is a cluster again: each stream is whole up to a point."""

import asyncio
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import pytest

from steward.testing.local_cluster import LocalCluster
from steward.testing.tab import Tab, many_sockets, open_tab
from steward.testing.waiting import eventually

pytestmark = pytest.mark.asyncio

SOON_S = 30.0
AGENTS = Path(__file__).parent / "agents.py"
USERS = [f"user-{n}" for n in range(6)]

TokenOf = Callable[[LocalCluster, str], str]


async def talk(tab: Tab, enough: asyncio.Event) -> None:
    number = 0
    while not enough.is_set():
        number += 1
        await tab.ask(f"m{number}", "5 5", SOON_S, agent="counter")


async def test_a_backup_under_load_is_restored_to_streams_that_are_whole(
    tmp_path: Path, token_of: TokenOf, clusters_to_show: list[LocalCluster]
) -> None:
    agents = f"--agent={AGENTS}:counter"
    first = LocalCluster.start(tmp_path, agents, data=tmp_path / "first")
    clusters_to_show.append(first)
    backup = str(tmp_path / "backup.tar")
    try:
        first.wait_ready()
        async with many_sockets() as http:
            tabs = {u: await open_tab(http, first.url, token_of(first, u)) for u in USERS}
            enough = asyncio.Event()
            talks = [asyncio.create_task(talk(tab, enough)) for tab in tabs.values()]
            await eventually(lambda: all(tab.sequence > 20 for tab in tabs.values()), "they talk")
            before = {user: tab.sequence for user, tab in tabs.items()}
            made = await asyncio.to_thread(first.try_steward, "backup", backup)
            assert made.returncode == 0, made.stderr
            await eventually(
                lambda: all(tab.sequence > before[u] + 20 for u, tab in tabs.items()), "and go on"
            )
            enough.set()
            await asyncio.gather(*talks)
            refused = await asyncio.to_thread(first.try_steward, "restore", backup)
            assert refused.returncode == 1 and "not empty" in refused.stderr
    finally:
        first.end()
    first.data.rename(tmp_path / "lost")
    assert first.steward("restore", backup).returncode == 0

    second = LocalCluster.start(tmp_path, agents, data=first.data)
    clusters_to_show.append(second)
    try:
        second.wait_ready()
        async with many_sockets() as http:
            for user, seen in tabs.items():
                token = token_of(second, user)
                stream = seen.ready["stream_id"]
                ahead = {"after": seen.sequence, "stream": stream}
                async with await open_tab(http, second.url, token, **ahead) as tab:
                    # Some of what this client saw was written after the backup.
                    assert tab.ready["resume"] == "reset" and tab.ready["stream_id"] == stream
                async with await open_tab(http, second.url, token, after=0) as tab:
                    await tab.ask("after the restore", "1 1", SOON_S, agent="counter")
                    assert tab.findings() == []
                    pairs = zip(tab.texts, seen.texts, strict=False)
                    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                    assert same >= before[user], "what was shown before the backup is in it"
                    assert tab.events[same]["epoch"] > seen.events[-1]["epoch"]
        breaches = await asyncio.to_thread(second.steward, "violations", "--breaches")
        assert breaches.stdout == ""
    finally:
        second.end()
