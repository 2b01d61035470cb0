"""The golden path of a socket at a real edge: ready, messages, resume, tabs, failover."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from edge.core.commands import Delivery
from steward.model.keys import UserKey

pytestmark = pytest.mark.asyncio
ALICE = UserKey("default", "alice")
BOB = UserKey("default", "bob")


async def test_a_message_is_accepted_and_its_event_comes_to_every_tab(edge: Any) -> None:
    async with edge.socket() as one, edge.socket() as two:
        assert one.ready["resume"] == "new" and one.ready["user_id"] == "alice"
        await one.send(type="user_message", id="m1", content="hello")
        accepted = await one.until("accepted")
        event = await two.until("user_message")
        assert (accepted["id"], accepted["sequence"], accepted["duplicate"]) == ("m1", 1, False)
        assert event["data"] == {"id": "m1", "content": "hello"}
        await two.send(type="user_message", id="m1", content="other")
        again = await two.until("accepted")
        assert (again["run_id"], again["duplicate"]) == (accepted["run_id"], True)


async def test_every_message_carries_a_trace_of_its_own(edge: Any) -> None:
    async with edge.socket() as one:
        for n in range(2):
            await one.send(type="user_message", id=f"m{n}", content="x")
        traces = [(await one.until("user_message"))["trace"] for _ in range(2)]
    assert len({trace[3:35] for trace in traces}) == 2
    assert all(trace.endswith("-00") for trace in traces)


async def test_frames_before_ready_are_handled_in_order(edge: Any) -> None:
    held: list[Any] = []
    edge.cluster.swallow = lambda command: bool(held.append(command)) or len(held) == 1
    async with edge.http.ws_connect(f"{edge.url}/v1/connect", headers=edge.bearer()) as ws:
        for n in range(3):
            await ws.send_str(json.dumps({"type": "user_message", "id": f"m{n}", "content": "x"}))
        frames = [json.loads((await ws.receive(10)).data) for _ in range(7)]
    assert frames[0]["type"] == "ready"
    assert [f["id"] for f in frames if f["type"] == "accepted"] == ["m0", "m1", "m2"]


@pytest.mark.parametrize(
    ("query", "resume", "first"),
    [
        ("", "new", 6),
        ("?after=0", "resumed", 1),
        ("?after=3", "resumed", 4),
        ("?after=9", "reset", 1),
    ],
)
async def test_resume_sends_what_is_missing_and_then_live_events(
    edge: Any, query: str, resume: str, first: int
) -> None:
    edge.cluster.emit_numbered(ALICE, 5)
    async with edge.socket(query=query) as client:
        assert (client.ready["resume"], client.ready["sequence"]) == (resume, 5)
        edge.cluster.emit_numbered(ALICE, 3)
        assert await client.sequences(9 - first) == list(range(first, 9))


async def test_a_long_replay_is_paged_and_merges_with_live_events(edge: Any) -> None:
    edge.cluster.emit_numbered(ALICE, 2_500, filler="x" * 200)
    async with edge.socket(query="?after=0") as client:
        for _ in range(20):
            edge.cluster.emit_numbered(ALICE, 10)
            await asyncio.sleep(0)
        assert await client.sequences(2_700) == list(range(1, 2_701))


async def test_users_never_see_each_other(edge: Any) -> None:
    async with edge.socket("alice") as alice, edge.socket("bob") as bob:
        edge.cluster.emit_numbered(ALICE, 3, canary="of-alice")
        edge.cluster.emit_numbered(BOB, 2, canary="of-bob")
        assert [(await alice.frame())["data"]["canary"] for _ in range(3)] == ["of-alice"] * 3
        assert [(await bob.frame())["data"]["canary"] for _ in range(2)] == ["of-bob"] * 2


async def test_equal_ids_in_two_tenants_are_two_users(edge: Any) -> None:
    url = f"{edge.url}/v1/connect"
    async with edge.socket("alice") as alice:
        async with edge.http.ws_connect(url, headers=edge.bearer("alice", tenant="other")) as ws:
            other = json.loads((await ws.receive(10)).data)
            edge.cluster.emit_numbered(ALICE, 1)
            assert (await alice.frame())["sequence"] == 1
            await ws.send_str('{"type":"ping","t":1}')
            assert json.loads((await ws.receive(10)).data) == {"type": "pong", "t": 1}
    assert (other["tenant_id"], other["sequence"]) == ("other", 0)


async def test_a_lost_manager_brings_a_pause_and_nothing_else(edge: Any) -> None:
    async with edge.socket() as client:
        edge.cluster.emit_numbered(ALICE, 2)
        assert await client.sequences(2) == [1, 2]
        edge.cluster.lose_manager(ALICE)
        edge.cluster.emit_numbered(ALICE, 2)
        await client.send(type="user_message", id="m1", content="x")
        assert await client.sequences(3) == [3, 4, 5]
        await client.send(type="ping", t=1)
        assert (await client.until("pong"))["t"] == 1


async def test_a_killed_node_is_left_for_the_new_manager(edge: Any) -> None:
    old = next(iter(edge.cluster.nodes.values()))
    async with edge.socket() as one, edge.socket(query="?after=0") as two:
        edge.cluster.emit_numbered(ALICE, 2)
        assert await one.sequences(2) == [1, 2]
        await edge.peers.add_node("node-2")
        await edge.peers.kill(old)
        await one.send(type="user_message", id="m1", content="x")
        edge.cluster.fence(old)
        edge.cluster.emit_numbered(ALICE, 3)
        assert sorted(await one.sequences(4)) == [3, 4, 5, 6]
        assert await two.sequences(6) == [1, 2, 3, 4, 5, 6]


async def test_an_unreachable_node_is_reported_to_the_registry(edge: Any) -> None:
    old = next(iter(edge.cluster.nodes.values()))
    await edge.peers.kill(old)
    async with asyncio.timeout(10):
        url = f"{edge.url}/v1/connect"
        async with edge.http.ws_connect(url, headers=edge.bearer()) as ws:
            await edge.eventually(lambda: edge.cluster.unreachable, "the node is reported")
            assert edge.cluster.unreachable[0] == old.incarnation
            await edge.peers.add_node("node-2")
            edge.cluster.fence(old)
            ready = json.loads((await ws.receive()).data)
    assert (ready["type"], ready["manager"]["node_id"]) == ("ready", "node-2")


async def test_the_registry_is_told_how_many_connections_are_open(edge: Any) -> None:
    peer = edge.peers.peer
    nobody = UserKey("default", "nobody")
    async with edge.socket(), edge.socket(), edge.socket("bob"):
        peer.ask_connections(7, ALICE, nobody)
        await edge.eventually(lambda: peer.counts, "the edge answers")
        count = peer.counts.pop()
        assert (count.question, count.open, list(count.of_users)) == (7, 3, [2, 0])

    def nobody_is_left() -> bool:
        peer.ask_connections(8, ALICE)
        return bool(peer.counts) and peer.counts[-1].open == 0

    await edge.eventually(nobody_is_left, "the sockets are closed")
    assert list(peer.counts[-1].of_users) == [0]


async def test_a_pushed_move_is_followed(edge: Any) -> None:
    other = await edge.peers.add_node("node-2")
    async with edge.socket() as client:
        edge.cluster.emit_numbered(ALICE, 1)
        edge.cluster.move(ALICE, other)
        edge.cluster.emit_numbered(ALICE, 2)
        assert await client.sequences(3) == [1, 2, 3]


async def test_events_of_a_lower_epoch_are_dropped(edge: Any) -> None:
    old = next(iter(edge.cluster.nodes.values()))
    other = await edge.peers.add_node("node-2")
    async with edge.socket() as client:
        stale = edge.cluster.placements[ALICE]
        edge.cluster.move(ALICE, other)
        edge.cluster.emit_numbered(ALICE, 1)
        assert await client.sequences(1) == [1]
        _, peer = edge.peers.node_servers[old.incarnation]
        zombie = b'{"type":"custom","event_id":"zombie","sequence":2}'
        for side in peer.sides:
            side.deliver(Delivery(ALICE, stale.epoch, 2, [zombie]))
        await client.send(type="user_message", id="m1", content="x")
        event = await client.until("user_message")
        assert event["sequence"] == 2
    dropped = edge.service.metrics.get_sample_value("steward_edge_stale_deliveries_total")
    assert dropped == 1


async def test_the_same_client_id_takes_over_at_once(edge: Any) -> None:
    async with (
        edge.socket(query="?client=tab-1") as old,
        edge.socket(query="?client=tab-2") as other,
    ):
        async with edge.socket(query="?client=tab-1") as new:
            assert await old.close_code() == 4504
            edge.cluster.emit_numbered(ALICE, 1)
            assert await new.sequences(1) == [1] and await other.sequences(1) == [1]


async def test_a_new_token_keeps_the_socket_and_an_expired_one_closes_it(edge: Any) -> None:
    url = f"{edge.url}/v1/connect"
    token = edge.auth.token(ttl_s=2)
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        edge.http.ws_connect(url, headers=headers) as renewed,
        edge.http.ws_connect(url, headers=headers) as left,
    ):
        await renewed.receive(5)
        foreign = edge.auth.token("bob")
        await renewed.send_str(json.dumps({"type": "auth", "token": foreign}))
        assert json.loads((await renewed.receive(5)).data)["reason"] == "PERMISSION_DENIED"
        await renewed.send_str(json.dumps({"type": "auth", "token": edge.auth.token()}))
        told = json.loads((await renewed.receive(5)).data)
        assert told["type"] == "authenticated" and told["token_expires_at"].endswith("Z")
        await left.receive(5)
        assert (await left.receive(10)).type is aiohttp.WSMsgType.CLOSE and left.close_code == 4001
        await renewed.send_str('{"type":"ping","t":1}')
        assert json.loads((await renewed.receive(5)).data)["type"] == "pong"


async def test_heartbeats_go_to_the_silent_and_the_deaf_are_closed(make_edge: Any) -> None:
    edge = await make_edge(heartbeat_seconds=0.3)
    deaf = await edge.raw()
    assert (await deaf.text())["type"] == "ready"
    closing = asyncio.ensure_future(deaf.close_code())
    async with edge.socket() as answering:
        for _ in range(4):
            assert await answering.until("heartbeat") == {"type": "heartbeat", "sequence": 0}
        assert closing.done() and closing.result() == 4007
        await answering.send(type="ping", t=1)
        assert (await answering.until("pong"))["t"] == 1


async def test_without_a_manager_the_socket_closes_after_ten_seconds_without_ready(
    make_edge: Any,
) -> None:
    edge = await make_edge()
    edge.cluster.nodes.clear()
    started = asyncio.get_running_loop().time()
    async with edge.http.ws_connect(f"{edge.url}/v1/connect", headers=edge.bearer()) as ws:
        message = await ws.receive(15)
    waited = asyncio.get_running_loop().time() - started
    assert message.type is aiohttp.WSMsgType.CLOSE and ws.close_code == 4003
    assert 9.5 < waited < 12


async def test_stopping_says_going_away_and_closes_with_4002(make_edge: Any) -> None:
    edge = await make_edge(drain_spread_ms=300)
    async with edge.socket() as one, edge.socket("bob") as two:
        started = asyncio.get_running_loop().time()
        stopping = asyncio.ensure_future(edge.service.stop())
        for client in (one, two):
            told = await client.until("going_away")
            assert 0 <= told["reconnect_after_ms"] <= 300
            assert await client.close_code() == 4002
        await stopping
        assert asyncio.get_running_loop().time() - started < 5


async def test_a_draining_edge_takes_nobody(
    make_edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.server.service.LAST_CALL_S", 10.0)
    edge = await make_edge(drain_spread_ms=1500)
    async with edge.socket() as client:
        stopping = asyncio.ensure_future(edge.service.stop())
        await client.until("going_away")
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await edge.http.ws_connect(f"{edge.url}/v1/connect", headers=edge.bearer())
        assert refused.value.status == 503 and refused.value.headers is not None
        assert refused.value.headers["Retry-After"] == "2"
    await stopping


async def test_an_aged_connection_is_asked_to_come_again(make_edge: Any) -> None:
    edge = await make_edge(max_connection_age_s=1)
    async with edge.socket() as client:
        assert (await client.until("going_away"))["reconnect_after_ms"] == 2000
        assert await client.close_code() == 4008
