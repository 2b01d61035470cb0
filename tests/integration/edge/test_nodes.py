"""Streams to nodes over real gRPC: warm, probed, dropped; and what users get of it."""

import asyncio
import json
from typing import Any

import pytest

from edge.core.commands import Attach
from steward.errors import Reason
from steward.model.keys import UserKey

pytestmark = pytest.mark.asyncio

LEASE_S = 5.0
ALICE, BOB = UserKey("default", "alice"), UserKey("default", "bob")


def first_node(edge: Any) -> Any:
    return next(iter(edge.cluster.nodes.values()))


async def test_every_node_that_lives_has_a_stream_before_anybody_needs_it(edge: Any) -> None:
    nodes = [first_node(edge), await edge.peers.add_node("node-2")]
    await edge.eventually(
        lambda: [edge.peers.streams(node) for node in nodes] == [1, 1], "both have a stream"
    )
    assert not edge.cluster.commands
    began = asyncio.get_running_loop().time()
    edge.cluster.fence(nodes[0])
    await edge.eventually(lambda: not edge.peers.streams(nodes[0]), "the fenced one has none")
    assert asyncio.get_running_loop().time() - began < 2, "at once, not when it was forgotten"
    assert edge.peers.streams(nodes[1]) == 1


async def test_a_stream_that_breaks_is_opened_again_while_its_node_lives(edge: Any) -> None:
    node = first_node(edge)
    _, peer = edge.peers.node_servers[node.incarnation]
    (old,) = peer.sides
    old.outbox.close()
    await edge.eventually(lambda: peer.sides - {old}, "there is another stream")
    await edge.eventually(lambda: edge.service.unready() is None, "it is proven again")
    assert edge.peers.streams(node) == 1


async def test_a_registry_that_names_no_node_for_a_moment_costs_nobody_a_stream(
    edge: Any,
) -> None:
    node = first_node(edge)
    _, peer = edge.peers.node_servers[node.incarnation]
    (side,) = peer.sides
    async with edge.socket() as client:
        edge.peers.peer.cluster_nodes({})
        edge.cluster.emit_numbered(ALICE, 1)
        assert await client.sequences(1) == [1]
        assert edge.service.unready() is None
        edge.peers.peer.cluster_nodes(edge.cluster.addresses())
        edge.cluster.emit_numbered(ALICE, 1)
        assert await client.sequences(1) == [2]
    assert peer.sides == {side}


async def test_a_node_that_is_no_longer_named_loses_its_stream_and_its_users_move(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.uplink.nodes.UNLISTED_MS", 300)
    old = first_node(edge)
    async with edge.socket() as client:
        await edge.peers.add_node("node-2")
        del edge.cluster.nodes[old.incarnation]
        edge.peers.peer.cluster_nodes(edge.cluster.addresses())
        await edge.eventually(lambda: not edge.peers.streams(old), "its stream is closed")
        await client.send(type="user_message", id="m1", content="x")
        assert (await client.until("user_message"))["sequence"] == 1
        assert edge.cluster.placements[ALICE].node_id == "node-2"


async def test_readiness_says_whether_nodes_are_there_and_answer(make_edge: Any) -> None:
    edge = await make_edge()
    node = first_node(edge)
    _, peer = edge.peers.node_servers[node.incarnation]
    peer.deaf = True
    await edge.eventually(
        lambda: edge.service.unready() == "no stream to an agent node carries anything",
        "a stream without echoes is no stream",
    )
    async with edge.http.get(f"{edge.url}/readyz") as answer:
        assert answer.status == 503 and "carries" in (await answer.json())["why"]
    peer.deaf = False
    await edge.eventually(lambda: edge.service.unready() is None, "one echo is enough")
    edge.cluster.fence(node)
    await edge.eventually(
        lambda: edge.service.unready() == "no agent node is up", "there is no node"
    )


async def test_history_is_read_from_a_node_that_answers(make_edge: Any, swallower: Any) -> None:
    edge = await make_edge()
    near = await edge.peers.add_node("node-2", swallower)
    edge.cluster.place(ALICE, near)
    edge.cluster.emit_numbered(ALICE, 3)
    async with edge.socket() as client:
        assert client.ready["manager"]["node_id"] == "node-2"
        swallower.swallows = True
        await edge.eventually(lambda: near.incarnation in edge.cluster.unreachable, "suspected")
        began = asyncio.get_running_loop().time()
        headers = edge.bearer()
        url = f"{edge.url}/v1/threads/main/events?after=0"
        async with edge.http.get(url, headers=headers) as answer:
            assert len((await answer.json())["events"]) == 3
        assert asyncio.get_running_loop().time() - began < 1


async def test_a_replay_whose_node_is_fenced_under_it_goes_on_at_another(
    make_edge: Any, swallower: Any
) -> None:
    edge = await make_edge()
    near = await edge.peers.add_node("node-2", swallower)
    edge.cluster.place(ALICE, near)
    edge.cluster.emit_numbered(ALICE, 3)
    async with edge.socket():
        swallower.swallows = True
        # Attached already, so `ready` comes at once; the page is asked for, and nobody answers.
        async with edge.socket(query="?after=0") as client:
            edge.cluster.fence(near)
            assert await client.sequences(3) == [1, 2, 3]


async def test_users_of_a_node_that_only_this_edge_cannot_reach_are_sent_away(
    make_edge: Any, swallower: Any
) -> None:
    edge = await make_edge()
    other = first_node(edge)
    cut_off = await edge.peers.add_node("node-2", swallower)
    edge.cluster.place(ALICE, cut_off)
    edge.cluster.place(BOB, other)
    loop = asyncio.get_running_loop()
    async with edge.socket() as alice, edge.socket("bob") as bob:
        began = loop.time()
        swallower.swallows = True
        told = await alice.until("going_away")
        assert loop.time() - began > LEASE_S, "a dead node would have been fenced by then"
        assert 0 < told["reconnect_after_ms"] <= 1_000
        assert await alice.close_code() == 4006
        assert cut_off.incarnation in edge.cluster.unreachable
        # It still serves others, and tells Alice at the door that she is wrong here.
        assert edge.service.unready() is None
        upgrade = {
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        headers = {**upgrade, **edge.bearer()}
        async with edge.http.get(f"{edge.url}/v1/connect", headers=headers) as answer:
            assert answer.status == 503
            assert (await answer.json())["reason"] == "MANAGER_UNAVAILABLE"
        await bob.send(type="user_message", id="m1", content="x")
        assert (await bob.until("user_message"))["sequence"] == 1
    # Once it is reached again, she is served here as before.
    swallower.swallows = False
    await edge.eventually(lambda: edge.service._hub.nodes.proven == 2, "both nodes are proven")
    async with edge.socket() as alice:
        assert alice.ready["manager"]["node_id"] == "node-2"


async def test_without_the_registry_nobody_is_sent_away(make_edge: Any, swallower: Any) -> None:
    edge = await make_edge()
    silent = await edge.peers.add_node("node-2", swallower)
    edge.cluster.place(ALICE, silent)
    hub = edge.service._hub
    async with edge.socket() as client:
        await edge.peers._servers[0].stop(0)
        await edge.eventually(lambda: not hub.registry.connected, "the registry is away")
        swallower.swallows = True
        await edge.eventually(lambda: hub.nodes.is_given_up(silent.incarnation), "it is silent")
        reach = hub.nodes._peers[silent.incarnation].reach
        await edge.eventually(lambda: reach.silent_ms > 3_000, "and stays so")
        await client.send(type="ping", t=1)
        assert (await client.frame()) == {"type": "pong", "t": 1}


async def test_a_silent_node_that_is_fenced_sends_nobody_away(
    make_edge: Any, swallower: Any
) -> None:
    edge = await make_edge()
    silent = await edge.peers.add_node("node-2", swallower)
    edge.cluster.place(ALICE, silent)
    async with edge.socket() as alice:
        swallower.swallows = True
        await edge.eventually(lambda: silent.incarnation in edge.cluster.unreachable, "suspected")
        edge.cluster.fence(silent)
        await alice.send(type="user_message", id="m1", content="x")
        assert (await alice.until("user_message"))["sequence"] == 1
        assert edge.cluster.placements[ALICE].node_id == "node-1"


async def test_fifty_users_of_a_fenced_node_are_served_again_far_below_a_second(
    make_edge: Any,
) -> None:
    edge = await make_edge()
    old = first_node(edge)
    users = [f"u{n}" for n in range(50)]
    tabs = [await edge.raw(user) for user in users]
    for tab in tabs:
        assert (await tab.text())["type"] == "ready"
    await edge.peers.add_node("node-2")
    loop = asyncio.get_running_loop()
    began = loop.time()
    edge.cluster.fence(old)
    for tab in tabs:
        tab.writer.write(tab.make(1, b'{"type":"user_message","id":"m1","content":"x"}'))
    for tab in tabs:
        while (await tab.text())["type"] != "user_message":
            pass
    took = loop.time() - began
    print(f"50 users: {took * 1000:.0f} ms")
    assert took < 1


async def test_an_evicted_user_loses_all_sessions_at_once_and_others_none(edge: Any) -> None:
    async with edge.socket() as one, edge.socket() as two, edge.socket("bob") as bob:
        edge.cluster.evict(ALICE)
        assert await one.close_code() == 4503 and await two.close_code() == 4503
        await bob.send(type="ping", t=1)
        assert (await bob.until("pong"))["t"] == 1
        attaches = [c for c in edge.cluster.commands if c.user == ALICE and c.body == Attach()]
        assert len(attaches) == 1


async def test_a_manager_that_says_evicted_ends_the_sessions_too(edge: Any) -> None:
    async with edge.socket() as client:
        resolves = edge.cluster.resolves
        edge.cluster.lose_manager(ALICE, Reason.USER_EVICTED.value)
        async with asyncio.timeout(10):
            message = await client.ws.receive()
        assert client.ws.close_code == 4503, json.dumps(str(message))
        assert edge.cluster.resolves == resolves
