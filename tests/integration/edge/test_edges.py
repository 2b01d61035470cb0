"""Two edges of one cluster: any serves any user, a client id lives once, a drain moves on."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from steward.model.keys import UserKey

pytestmark = pytest.mark.asyncio

ALICE = UserKey("default", "alice")


@pytest_asyncio.fixture
async def edges(make_edge: Any) -> list[Any]:
    """Two edges that share registry, auth and one node."""
    one = await make_edge()
    return [one, await make_edge(peers=one.peers, id="edge-2")]


async def test_any_edge_serves_any_user_and_both_show_the_same(edges: list[Any]) -> None:
    one, two = edges
    async with one.socket() as here, two.socket() as there:
        await here.send(type="user_message", id="m1", content="x")
        assert await here.sequences(1) == await there.sequences(1) == [1]
        await there.send(type="user_message", id="m1", content="x")
        again = await there.until("accepted")
        assert again["duplicate"] and again["sequence"] == 1


async def test_a_client_that_comes_to_another_edge_takes_over_at_once(edges: list[Any]) -> None:
    one, two = edges
    async with (
        one.socket(query="?client=tab-1") as old,
        one.socket(query="?client=tab-2") as other,
        one.socket("bob", "?client=tab-1") as bob,
    ):
        async with two.socket(query="?client=tab-1") as new:
            assert await old.close_code() == 4504
            one.cluster.emit_numbered(ALICE, 1)
            assert await new.sequences(1) == await other.sequences(1) == [1]
            await bob.send(type="ping", t=1)
            assert (await bob.until("pong"))["t"] == 1
            # And back again.
            async with one.socket(query="?client=tab-1&after=0") as newest:
                assert await new.close_code() == 4504
                assert await newest.sequences(1) == [1]


@contextlib.asynccontextmanager
async def race(edges: list[Any], client: str) -> AsyncIterator[list[Any]]:
    """A socket at each edge, with one client id, opened at the same time."""
    async with contextlib.AsyncExitStack() as stack:
        order = random.sample(edges, len(edges))
        entering = [stack.enter_async_context(e.socket(query=f"?client={client}")) for e in order]
        yield list(await asyncio.gather(*entering))


async def test_of_two_edges_that_race_exactly_one_connection_survives(edges: list[Any]) -> None:
    for n in range(15):
        async with race(edges, f"tab-{n}") as sockets:
            closing = [asyncio.ensure_future(socket.close_code()) for socket in sockets]
            done, alive = await asyncio.wait(
                closing, timeout=5, return_when=asyncio.FIRST_COMPLETED
            )
            assert [task.result() for task in done] == [4504] and len(alive) == 1
            (survivor,) = alive
            survivor.cancel()
            await asyncio.gather(survivor, return_exceptions=True)
            socket = sockets[closing.index(survivor)]
            await socket.send(type="ping", t=n)
            assert (await socket.until("pong"))["t"] == n


async def test_a_client_that_was_never_attached_is_announced_only_while_it_is_here(
    edges: list[Any],
) -> None:
    one, two = edges
    async with two.socket(query="?client=tab-1") as there:
        one.cluster.swallow = lambda command: True
        url = f"{one.url}/v1/connect?client=tab-1"
        async with one.http.ws_connect(url, headers=one.bearer()):
            await one.eventually(lambda: one.service._hub.connections == 1, "it is taken")
        await one.eventually(lambda: not one.service._hub.connections, "it is gone")
        one.cluster.swallow = lambda command: False
        async with one.socket() as mine:
            await mine.send(type="user_message", id="m1", content="x")
            assert await there.sequences(1) == [1]


# ---- leaving


async def test_whoever_is_sent_away_by_a_draining_edge_lands_on_the_other_of_its_port(
    make_edge: Any,
) -> None:
    one = await make_edge(drain_spread_ms=1_000)
    two = await make_edge(peers=one.peers, id="edge-2", port=one.service.port)
    async with contextlib.AsyncExitStack() as stack:
        # The kernel spreads connections over both; those of the first are of interest.
        sockets: dict[str, Any] = {}
        for n in range(60):
            before = one.service._hub.connections
            socket = await stack.enter_async_context(one.socket(f"u{n}"))
            if one.service._hub.connections > before:
                sockets[f"u{n}"] = socket
        assert sockets and len(sockets) < 60
        one.cluster.emit_numbered(UserKey("default", next(iter(sockets))), 3)
        stopping = asyncio.ensure_future(one.service.stop())

        async def leave(user: str, socket: Any) -> int:
            going = await socket.until("going_away")
            assert await socket.close_code() == 4002
            async with one.socket(user) as again:
                await again.send(type="ping", t=1)
                assert (await again.until("pong"))["t"] == 1
            return int(going["reconnect_after_ms"])

        told = await asyncio.gather(*(leave(*item) for item in sockets.items()))
        await stopping
        assert all(300 <= after_ms <= 1_000 for after_ms in told)
        assert max(told) - min(told) > 200, "they are spread"
        assert two.service._hub.connections == 60 - len(sockets)


async def test_what_came_before_the_close_is_delivered_before_the_close(make_edge: Any) -> None:
    edge = await make_edge(drain_spread_ms=400)
    async with edge.socket() as client:
        stopping = asyncio.ensure_future(edge.service.stop())
        sent = 0
        seen: list[int] = []

        async def emit() -> None:
            nonlocal sent
            while edge.service._hub.connections:
                edge.cluster.emit_numbered(ALICE, 1)
                sent += 1
                await asyncio.sleep(0.002)

        emitting = asyncio.ensure_future(emit())
        async with asyncio.timeout(10):
            while (message := await client.ws.receive()).type is aiohttp.WSMsgType.TEXT:
                frame = message.json()
                if "event_id" in frame:
                    seen.append(frame["sequence"])
        assert client.ws.close_code == 4002
        await asyncio.gather(stopping, emitting)
        assert seen == list(range(1, len(seen) + 1)) and len(seen) > 20


async def test_connections_of_one_moment_age_at_different_ones(make_edge: Any) -> None:
    edge = await make_edge(max_connection_age_s=1)
    loop = asyncio.get_running_loop()
    tabs = [await edge.raw(f"u{n}") for n in range(20)]
    opened = loop.time()

    async def aged(tab: Any) -> float:
        while (await tab.text())["type"] != "going_away":
            pass
        at = loop.time()
        assert await tab.close_code() == 4008
        return at - opened

    ages = await asyncio.gather(*map(aged, tabs))
    assert max(ages) - min(ages) > 0.02 and min(ages) > 0.5


async def test_many_connections_are_sent_away_in_time(make_edge: Any) -> None:
    edge = await make_edge(drain_spread_ms=1_500)
    tabs = [await edge.raw(f"u{n % 40}") for n in range(400)]
    for tab in tabs:
        assert (await tab.text())["type"] == "ready"
    loop = asyncio.get_running_loop()
    began = loop.time()
    stopping = asyncio.ensure_future(edge.service.stop())

    async def gone(tab: Any) -> int:
        assert (await tab.text())["type"] == "going_away"
        code: int = await tab.close_code()
        tab.writer.close()
        return code

    assert set(await asyncio.gather(*map(gone, tabs))) == {4002}
    await stopping
    assert loop.time() - began < 5
