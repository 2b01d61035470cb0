"""What a client may do wrong at a real socket, and what comes of it: never a crash."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest

from edge.core.commands import Detach
from steward.model.keys import UserKey

pytestmark = pytest.mark.asyncio
ALICE = UserKey("default", "alice")
FRAMES = json.loads(
    (Path(__file__).parents[3] / "protos" / "testdata" / "frames.json").read_text()
)["cases"]


def text_of(case: dict[str, Any]) -> bytes:
    text = case["text"]
    if isinstance(text, dict):
        text = "".join(part * times for part, times in text["repeat"])
    return str(text).encode("utf-8", "surrogatepass")


async def alive(raw: Any) -> bool:
    """Whether the socket still answers."""
    raw.writer.write(raw.make(1, b'{"type":"ping","t":77}'))
    while True:
        frame = await raw.text()
        if frame["type"] == "pong":
            return bool(frame["t"] == 77)


async def opened(edge: Any, user: str = "alice") -> Any:
    raw = await edge.raw(user)
    assert (await raw.text())["type"] == "ready"
    return raw


async def test_frames_in_the_segment_of_the_handshake_are_not_lost(edge: Any) -> None:
    one = edge.make(1, b'{"type":"ping","t":5}')
    raw = await edge.raw(behind=one + one[:9])
    raw.writer.write(one[9:])
    kinds = [(await raw.text())["type"] for _ in range(3)]
    assert kinds == ["ready", "pong", "pong"]


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (b"\x81\x02hi", 1002),
        (b"\xc1\x80\x00\x00\x00\x00", 1002),
        (b"\x83\x80\x00\x00\x00\x00", 1002),
        (b"\x80\x80\x00\x00\x00\x00", 1002),
        (b"\x09\x80\x00\x00\x00\x00", 1002),
        (b"\x81\x81\x00\x00\x00\x00\xff", 1007),
        (b"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff", 1009),
        (b"\x88\x81\x00\x00\x00\x00\x00", 1002),
    ],
    ids=["unmasked", "reserved", "opcode", "continuation", "split ping", "utf8", "huge", "close"],
)
async def test_broken_framing_closes_with_the_code_of_the_rfc(
    edge: Any, wire: bytes, code: int
) -> None:
    raw = await opened(edge)
    raw.writer.write(wire)
    assert await raw.close_code() == code


async def test_broken_framing_before_ready_closes_too(edge: Any) -> None:
    edge.cluster.swallow = lambda command: True
    raw = await edge.raw()
    raw.writer.write(b"\x81\x02hi")
    assert await raw.close_code() == 1002


async def test_every_invalid_vector_is_refused_and_the_socket_lives(edge: Any) -> None:
    refused = [case for case in FRAMES if "reason" in case]
    # Fewer than ten violations to a socket: the tenth would close it.
    for start in range(0, len(refused), 9):
        raw = await opened(edge)
        for case in refused[start : start + 9]:
            if "binary" in case:
                raw.writer.write(raw.make(2, base64.b64decode(case["binary"])))
            else:
                raw.writer.write(raw.make(1, text_of(case)))
            answer = await raw.text()
            assert answer["type"] == "error" and answer["reason"] == case["reason"], case["name"]
            assert answer.get("ref") == case.get("ref"), case["name"]
        assert await alive(raw)


async def test_every_valid_vector_is_taken(edge: Any) -> None:
    raw = await opened(edge)
    for case in FRAMES:
        if "means" not in case:
            continue
        kind = case["means"]["type"]
        if kind == "auth":
            continue
        raw.writer.write(raw.make(1, text_of(case)))
    seen = 0
    raw.writer.write(raw.make(1, b'{"type":"ping","t":1}'))
    while True:
        frame = await raw.text()
        assert frame.get("reason") != "PROTOCOL_VIOLATION", frame
        seen += frame["type"] == "pong"
        if frame == {"type": "pong", "t": 1}:
            break
    assert seen == 3


async def test_vectors_that_close_do(edge: Any) -> None:
    for case in (case for case in FRAMES if "close" in case):
        raw = await opened(edge)
        raw.writer.write(raw.make(1, text_of(case)))
        assert await raw.close_code() == case["close"], case["name"]


async def test_ten_violations_in_a_minute_close(edge: Any) -> None:
    raw = await opened(edge)
    raw.writer.write(raw.make(2, b"x") * 10)
    answers = [await raw.text() for _ in range(10)]
    assert {answer["reason"] for answer in answers} == {"PROTOCOL_VIOLATION"}
    assert await raw.close_code() == 4502


async def test_a_client_that_closes_is_answered_with_its_own_code(edge: Any) -> None:
    raw = await opened(edge)
    raw.writer.write(raw.make(8, (3456).to_bytes(2, "big") + b"bye"))
    assert await raw.read() == (8, (3456).to_bytes(2, "big"))
    assert await raw.read() == (-1, b"")


async def test_pings_are_answered_with_their_payload(edge: Any) -> None:
    raw = await opened(edge)
    raw.writer.write(raw.make(9, b"abc"))
    assert await raw.read() == (10, b"abc")


async def test_a_flood_before_ready_stops_the_reading_and_is_handled_afterwards(
    edge: Any,
) -> None:
    edge.cluster.swallow = lambda command: True
    raw = await edge.raw()
    one = raw.make(1, json.dumps({"type": "ping", "t": 1, "pad": "x" * 1000}).encode())
    raw.writer.write(one * 20_000)
    await asyncio.sleep(0.5)
    received = edge.service.metrics.get_sample_value("steward_edge_frames_received_total")
    # 20 MB do not fit into the buffers of the kernel: the rest waits at the client.
    assert received == 32 and raw.writer.transport.get_write_buffer_size() > 1_000_000
    edge.cluster.swallow = lambda command: False
    edge.cluster.lose_manager(ALICE)
    answers = [(await raw.text())["type"] for _ in range(20_001)]
    assert answers[0] == "ready" and set(answers[1:]) == {"pong"}


async def test_a_reader_that_sleeps_is_closed_and_slows_nobody(make_edge: Any) -> None:
    edge = await make_edge(max_write_buffer_bytes=65_536)
    asleep = await opened(edge)
    async with edge.socket() as awake:
        for _ in range(400):
            edge.cluster.emit_numbered(ALICE, 5, filler="x" * 4_000)
            await awake.sequences(5)
        closed = edge.service.metrics.get_sample_value(
            "steward_edge_closes_total", {"code": "4004"}
        )
        assert closed == 1
        edge.cluster.emit_numbered(ALICE, 1)
        assert await awake.sequences(1) == [2001]
    assert await asleep.close_code() in (4004, -1)


async def test_a_slow_replay_waits_for_its_reader_and_loses_nothing(make_edge: Any) -> None:
    edge = await make_edge(max_write_buffer_bytes=65_536 * 8)
    edge.cluster.emit_numbered(ALICE, 6_000, filler="x" * 2_000)
    raw = await edge.raw(query="?after=0")
    assert (await raw.text())["type"] == "ready"
    await asyncio.sleep(0.3)
    edge.cluster.emit_numbered(ALICE, 10)
    found = [(await raw.text())["sequence"] for _ in range(6_010)]
    assert found == list(range(1, 6_011))


async def test_a_connection_that_vanishes_leaves_nothing(edge: Any) -> None:
    for _ in range(20):
        raw = await opened(edge)
        raw.writer.transport.abort()
    gauge = ("steward_edge_connections", {"kind": "websocket"})
    await edge.eventually(
        lambda: edge.service.metrics.get_sample_value(*gauge) == 0, "all connections are gone"
    )
    await edge.eventually(
        lambda: edge.service.metrics.get_sample_value("steward_edge_users") == 0,
        "the audience is forgotten",
    )
    (node,) = edge.cluster.nodes.values()
    await edge.eventually(lambda: not node.attached[ALICE], "the node was told")
    assert [c.body for c in edge.cluster.commands].count(Detach()) == 1
