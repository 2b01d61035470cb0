"""Clients that read too slowly, at a real edge: merged deltas for who asked, SLOW_CONSUMER else."""

import asyncio
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import orjson
import pytest

from edge.host.merging import LOW_MARK_BYTES
from steward.client.client import Client
from steward.client.events import Event
from steward.model.keys import UserKey

pytestmark = pytest.mark.asyncio
ALICE = UserKey("default", "alice")
SMALL_BUFFER = 16_384


def delta(edge: Any, sequence: int, text: str, message: str = "r1.m1") -> bytes:
    """An `agent_text` as a manager writes it."""
    return orjson.dumps(
        {
            "type": "agent_text",
            "stream_id": edge.cluster.stream(ALICE).stream_id,
            "sequence": sequence,
            "epoch": 1,
            "event_id": f"e{sequence}-1",
            "thread_id": "main",
            "run_id": "r1",
            "agent": "demo",
            "time": "2026-11-23T21:00:00.123Z",
            "trace": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00",
            "data": {"message_id": message, "delta": text},
        }
    )


def say(edge: Any, count: int, message: str = "r1.m1") -> None:
    """The next `count` deltas, each with its own sequence as text."""
    stored = len(edge.cluster.stream(ALICE).events)
    numbers = range(stored + 1, stored + count + 1)
    edge.cluster.emit(ALICE, [delta(edge, n, f"{n} ", message) for n in numbers])


async def opened(edge: Any, query: str = "?merge=1", receive_buffer: int = SMALL_BUFFER) -> Any:
    raw = await edge.raw(query=query, receive_buffer=receive_buffer)
    ready = await raw.text()
    assert ready["type"] == "ready" and ready.get("merge", False) is ("merge=1" in query)
    return raw


async def read_events(raw: Any, until: int) -> list[bytes]:
    """The texts of the events up to a sequence."""
    found: list[bytes] = []
    while not found or orjson.loads(found[-1])["sequence"] < until:
        opcode, payload = await raw.read()
        assert opcode in (1, 9), (opcode, payload)
        if opcode == 1 and b'"event_id"' in payload:
            found.append(payload)
    return found


def texts_of(events: list[dict[str, Any]], first: int) -> dict[str, str]:
    """Text of each message; sequences must follow each other from `first`."""
    texts: dict[str, str] = defaultdict(str)
    for event in events:
        assert event.get("from_sequence", event["sequence"]) == first, event
        first = event["sequence"] + 1
        if event["type"] == "agent_text":
            texts[event["data"]["message_id"]] += event["data"]["delta"]
    return dict(texts)


def numbers(first: int, last: int) -> str:
    return "".join(f"{n} " for n in range(first, last + 1))


async def test_who_falls_behind_gets_merged_deltas_and_everybody_else_every_event(
    edge: Any,
) -> None:
    slow = await opened(edge)
    keeps_up = await opened(edge)
    plain = await opened(edge, query="")
    fast: dict[Any, list[bytes]] = {keeps_up: [], plain: []}
    total = 0
    for _ in range(100):
        say(edge, 100)
        total += 100
        for raw, events in fast.items():
            events += await read_events(raw, total)
    edge.cluster.emit_numbered(ALICE, 1)
    say(edge, 500, "r1.m2")
    total += 501
    for raw, events in fast.items():
        events += await read_events(raw, total)
    got = [orjson.loads(text) for text in await read_events(slow, total)]
    assert texts_of(got, 1) == {"r1.m1": numbers(1, 10_000), "r1.m2": numbers(10_002, total)}
    assert len(got) < 2_000
    assert [event["sequence"] for event in got if event["type"] == "custom"] == [10_001]
    stored = edge.cluster.stream(ALICE).events
    for events in fast.values():
        assert events == stored


async def test_a_merging_client_that_is_too_slow_all_the_same_is_closed_and_resumes(
    make_edge: Any,
) -> None:
    edge = await make_edge(max_write_buffer_bytes=65_536)
    asleep = await opened(edge, query="?merge=1&client=tab")
    closes = ("steward_edge_closes_total", {"code": "4004"})
    while not edge.service.metrics.get_sample_value(*closes):
        edge.cluster.emit_numbered(ALICE, 5, filler="x" * 2_000)
        await asyncio.sleep(0)
    total = len(edge.cluster.stream(ALICE).events)
    # What the kernel held, the low mark, the bound: not megabytes.
    assert total * 2_000 < 65_536 + 10 * (SMALL_BUFFER + LOW_MARK_BYTES)
    last = 0
    while (frame := await asleep.read())[0] != 8:
        if frame[0] == 1:
            last = json.loads(frame[1])["sequence"]
    assert int.from_bytes(frame[1][:2], "big") == 4004 and 0 < last < total
    again = await opened(edge, query=f"?merge=1&client=tab&after={last}")
    got = [orjson.loads(text) for text in await read_events(again, total)]
    assert [event["sequence"] for event in got] == list(range(last + 1, total + 1))


async def test_one_message_never_outgrows_a_client_that_merges(make_edge: Any) -> None:
    edge = await make_edge(max_write_buffer_bytes=262_144)
    slow = await opened(edge)
    for _ in range(200):
        say(edge, 50)
        await asyncio.sleep(0)
    got = [orjson.loads(text) for text in await read_events(slow, 10_000)]
    assert texts_of(got, 1) == {"r1.m1": numbers(1, 10_000)}


async def test_a_position_inside_of_a_merged_event_is_resumed_at_exactly_that_place(
    edge: Any,
) -> None:
    slow = await opened(edge)
    for _ in range(100):
        say(edge, 50)
        await asyncio.sleep(0)
    got = [orjson.loads(text) for text in await read_events(slow, 5_000)]
    merged = next(event for event in got if event.get("from_sequence", 5_000) < event["sequence"])
    inside = merged["from_sequence"]
    slow.writer.write(slow.make(1, b'{"type":"ack","sequence":%d}' % inside))
    again = await opened(edge, query=f"?merge=1&after={inside}", receive_buffer=0)
    rest = [orjson.loads(text) for text in await read_events(again, 5_000)]
    assert texts_of(rest, inside + 1) == {"r1.m1": numbers(inside + 1, 5_000)}


async def test_a_slow_replay_is_merged_for_who_asked(edge: Any) -> None:
    say(edge, 20_000)
    slow = await opened(edge, query="?merge=1&after=0")
    edge.cluster.emit_numbered(ALICE, 1)
    got = [orjson.loads(text) for text in await read_events(slow, 20_001)]
    assert texts_of(got, 1) == {"r1.m1": numbers(1, 20_000)}
    assert len(got) < 3_000
    plain = await opened(edge, query="?after=0")
    assert await read_events(plain, 20_001) == edge.cluster.stream(ALICE).events


async def test_the_same_client_id_takes_over_from_one_that_is_behind(edge: Any) -> None:
    slow = await opened(edge, query="?merge=1&client=tab")
    for _ in range(200):
        say(edge, 50)
        await asyncio.sleep(0)
    again = await opened(edge, query="?merge=1&client=tab&after=0", receive_buffer=0)
    assert await slow.close_code() == 4504
    got = [orjson.loads(text) for text in await read_events(again, 10_000)]
    assert texts_of(got, 1) == {"r1.m1": numbers(1, 10_000)}


@pytest.mark.parametrize("query", ["merge=2", "merge=", "merge=true", "merge=1&merge=1"])
async def test_a_merge_that_is_neither_1_nor_0_is_refused(edge: Any, query: str) -> None:
    url = f"{edge.url}/v1/connect?{query}"
    upgrade = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    async with edge.http.get(url, headers=edge.bearer() | upgrade) as answer:
        assert answer.status == 400 and (await answer.json())["reason"] == "PROTOCOL_VIOLATION"


async def test_server_sent_events_refuse_merge(edge: Any) -> None:
    async with edge.http.get(f"{edge.url}/v1/events?merge=1", headers=edge.bearer()) as answer:
        assert answer.status == 400 and "WebSockets" in (await answer.json())["message"]
    async with edge.http.get(f"{edge.url}/v1/events?merge=0", headers=edge.bearer()) as answer:
        assert answer.status == 200


async def test_the_python_client_reads_merged_deltas_as_one_text(edge: Any) -> None:
    seen: list[Event] = []
    ready: list[dict[str, Any]] = []
    token = edge.auth.token()
    async with Client(
        edge.url,
        token=token,
        after=0,
        merge=True,
        buffer=4,
        on_opened=lambda opened: ready.append(dict(opened.frame)),
    ) as client:
        for _ in range(400):
            say(edge, 100)
            await asyncio.sleep(0)
        async for event in client:
            seen.append(event)
            if event.sequence == 40_000:
                break
    assert [frame["merge"] for frame in ready] == [True]
    expected = 1
    for event in seen:
        assert event.from_sequence == expected
        expected = event.sequence + 1
    assert "".join(event.data["delta"] for event in seen) == numbers(1, 40_000)
    assert any(event.from_sequence < event.sequence for event in seen)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
async def test_the_javascript_client_reads_merged_deltas_as_one_text(edge: Any) -> None:
    say(edge, 1)
    options = [] if await node_major() >= 22 else ["--experimental-websocket"]
    process = await asyncio.create_subprocess_exec(
        "node",
        "--no-warnings",
        *options,
        str(Path(__file__).parent / "slow_reader.mjs"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
        env=os.environ
        | {
            "STEWARD_URL": edge.url,
            "STEWARD_TOKEN": edge.auth.token(),
            "STEWARD_STREAM": edge.cluster.stream(ALICE).stream_id,
        },
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        async with asyncio.timeout(30):
            assert json.loads(await process.stdout.readline()) == {"merge": True}
            for _ in range(400):
                say(edge, 100)
                await asyncio.sleep(0)
            process.stdin.write(b"40001\n")
            seen = json.loads(await process.stdout.readline())
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    expected = 1
    for first, last in seen["ranges"]:
        assert first == expected
        expected = last + 1
    assert expected == 40_002 and seen["text"] == numbers(1, 40_001)
    assert any(first < last for first, last in seen["ranges"])


async def node_major() -> int:
    process = await asyncio.create_subprocess_exec(
        "node", "--version", stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    return int(output.decode().lstrip("v").partition(".")[0])
