"""What an edge puts on record: each refusal and each breach, by the real way to the registry."""

from typing import Any

import aiohttp
import pytest

from edge.core.commands import Delivery
from steward.model.keys import Epoch, UserKey

pytestmark = pytest.mark.asyncio

ALICE = UserKey("default", "alice")
ZOMBIE = b'{"type":"custom","event_id":"zombie","sequence":1}'


async def recorded(edge: Any, kind: str) -> Any:
    """The first violation of this kind, once it is on record."""
    found: list[Any] = []

    def look() -> bool:
        found[:] = [v for v in edge.peers.violations if v.kind == kind]
        return bool(found)

    await edge.eventually(look, f"{kind} is on record")
    return found[0]


async def next_event(client: Any) -> Any:
    """The next event, whatever frames come before it."""
    while "event_id" not in (frame := await client.frame()):
        pass
    return frame


def side_of(edge: Any, node: Any) -> Any:
    """The edge's stream at this node."""
    (side,) = edge.peers.node_servers[node.incarnation][1].sides
    return side


async def test_a_delivery_under_an_epoch_that_is_over_is_dropped_and_on_record(edge: Any) -> None:
    old = next(iter(edge.cluster.nodes.values()))
    other = await edge.peers.add_node("node-2")
    async with edge.socket() as client:
        stale = edge.cluster.placements[ALICE]
        edge.cluster.move(ALICE, other)
        edge.cluster.emit_numbered(ALICE, 1)
        assert await client.sequences(1) == [1]
        side_of(edge, old).deliver(Delivery(ALICE, stale.epoch, 2, [ZOMBIE]))
        row = await recorded(edge, "stale_delivery")
        assert (row.user.user_id, row.epoch) == ("alice", stale.epoch)
        assert (row.node_id, row.node_rev) == old.incarnation
        await client.send(type="user_message", id="m1", content="x")
        assert (await next_event(client))["event_id"] == "e2"
    value = edge.service.metrics.get_sample_value
    assert value("steward_refusals_total", {"kind": "stale_delivery"}) == 1


@pytest.mark.parametrize("ahead", [0, 1])
async def test_a_delivery_of_another_node_is_dropped_and_on_record(edge: Any, ahead: int) -> None:
    thief = await edge.peers.add_node("node-2")
    await edge.eventually(lambda: edge.peers.streams(thief) == 1, "it has a stream")
    async with edge.socket() as client:
        placed = edge.cluster.placements[ALICE]
        epoch = Epoch(placed.epoch + ahead)
        side_of(edge, thief).deliver(Delivery(ALICE, epoch, 1, [ZOMBIE]))
        row = await recorded(edge, "foreign_delivery")
        assert (row.user.user_id, row.node_id) == ("alice", "node-2")
        await client.send(type="user_message", id="m1", content="x")
        assert (await next_event(client))["event_id"] == "e1"


async def test_a_delivery_for_nobody_is_on_record_but_one_behind_a_detach_is_not(
    edge: Any,
) -> None:
    node = next(iter(edge.cluster.nodes.values()))
    hub = edge.service._hub
    async with edge.socket():
        placed = edge.cluster.placements[ALICE]
    await edge.eventually(lambda: ALICE not in hub._audiences.by_user, "she is forgotten")
    side = side_of(edge, node)
    side.deliver(Delivery(ALICE, placed.epoch, 1, [ZOMBIE]))
    side.deliver(Delivery(UserKey("default", "bob"), Epoch(9), 1, [ZOMBIE]))
    row = await recorded(edge, "foreign_delivery")
    assert row.user.user_id == "bob"
    assert [v.user.user_id for v in edge.peers.violations] == ["bob"]


async def test_a_hole_in_the_stream_is_filled_from_the_log_and_on_record(edge: Any) -> None:
    async with edge.socket() as client:
        edge.cluster.emit_numbered(ALICE, 1)
        node = next(iter(edge.cluster.nodes.values()))
        sides, node.attached[ALICE] = node.attached[ALICE], []
        edge.cluster.emit_numbered(ALICE, 2)
        node.attached[ALICE] = sides
        edge.cluster.emit_numbered(ALICE, 1)
        assert await client.sequences(4) == [1, 2, 3, 4]
        row = await recorded(edge, "delivery_gap")
        assert row.evidence == "event 4 came when 2 was the next"


async def test_a_stream_that_went_back_is_a_breach(edge: Any) -> None:
    async with edge.socket() as client:
        edge.cluster.emit_numbered(ALICE, 3)
        assert await client.sequences(3) == [1, 2, 3]
        del edge.cluster.stream(ALICE).events[1:]
        edge.cluster.lose_manager(ALICE)
        assert await client.close_code() == 4006
    row = await recorded(edge, "stream_went_back")
    assert row.evidence == "event 3 was shown, and the stream ends at 1"
    value = edge.service.metrics.get_sample_value
    assert value("steward_breaches_total", {"kind": "stream_went_back"}) == 1


async def test_a_user_in_a_body_is_refused_and_on_record(edge: Any) -> None:
    body = {"id": "m1", "content": "x", "user_id": "bob"}
    async with edge.socket() as client:
        await client.send(type="user_message", **body)
        assert (await client.until("error"))["reason"] == "PROTOCOL_VIOLATION"
        assert (await recorded(edge, "foreign_user")).user.user_id == "alice"
    edge.peers.violations.clear()
    headers = edge.bearer("carol")
    async with edge.http.post(f"{edge.url}/v1/messages", json=body, headers=headers) as answer:
        assert answer.status == 400
    assert (await recorded(edge, "foreign_user")).user.user_id == "carol"


async def test_a_foreign_origin_is_refused_and_on_record_without_the_token(edge: Any) -> None:
    headers = {**edge.bearer(), "Origin": "https://evil.example"}
    async with edge.http.get(f"{edge.url}/v1/connect", headers=headers) as answer:
        assert answer.status == 403
    row = await recorded(edge, "foreign_origin")
    assert "evil.example" in row.evidence and "/v1/connect" in row.evidence
    assert edge.auth.token()[:20] not in row.evidence


async def test_a_ticket_that_comes_again_is_on_record_and_a_guessed_one_is_not(edge: Any) -> None:
    async with edge.http.post(f"{edge.url}/v1/tickets", headers=edge.bearer()) as answer:
        ticket = (await answer.json())["ticket"]
    url = f"{edge.url}/v1/connect?ticket="
    async with edge.http.ws_connect(url + ticket) as ws:
        await ws.receive()
        told = []
        for bad in ("guessed", ticket):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await edge.http.ws_connect(url + bad)
            told.append((refused.value.status, refused.value.message))
        assert told[0] == told[1] and told[0][0] == 401
    row = await recorded(edge, "replayed_ticket")
    assert row.user.user_id == "alice" and ticket not in row.evidence
    assert [v.kind for v in edge.peers.violations] == ["replayed_ticket"]


async def test_what_is_seen_often_is_one_row_with_a_count(edge: Any) -> None:
    node = next(iter(edge.cluster.nodes.values()))
    async with edge.socket():
        side = side_of(edge, node)
        for _ in range(100):
            side.deliver(Delivery(ALICE, Epoch(0), 1, [ZOMBIE]))
        await edge.eventually(
            lambda: sum(v.count or 1 for v in edge.peers.violations) == 100, "all are counted"
        )
        assert len(edge.peers.violations) <= 3
