"""The checks that a load client makes: every way in which a stream can be wrong ends it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio

from steward.load.wire import LoadSocket, StreamBroken, connect

Send = Callable[..., Awaitable[None]]


def event(sequence: int, stream: str = "s-1", kind: str = "custom") -> dict[str, Any]:
    return {"type": kind, "stream_id": stream, "sequence": sequence, "epoch": 1}


def frame(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":")).encode()
    head = (
        bytes((0x81, len(text))) if len(text) < 126 else b"\x81\x7e" + len(text).to_bytes(2, "big")
    )
    return head + text


class Edge:
    """Answers one handshake, says `ready`, and then what a test says."""

    def __init__(self) -> None:
        self.writer: asyncio.StreamWriter | None = None
        self.address = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        ready = {"type": "ready", "stream_id": "s-1", "sequence": 7}
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + frame(ready))
        self.writer = writer

    def say(self, *contents: dict[str, Any]) -> None:
        assert self.writer is not None
        self.writer.write(b"".join(map(frame, contents)))


@pytest_asyncio.fixture
async def edge() -> AsyncIterator[Edge]:
    edge = Edge()
    server = await asyncio.start_server(edge.handle, "127.0.0.1", 0)
    edge.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield edge
    server.close()
    if edge.writer is not None:
        edge.writer.close()


async def opened(edge: Edge) -> LoadSocket:
    return await connect(edge.address, "alice", "token")


@pytest.mark.asyncio
async def test_events_in_order_are_counted(edge: Edge) -> None:
    socket = await opened(edge)
    edge.say(event(8), event(9), event(10, kind="agent_completed"))
    await socket.until_runs_ended(1, 5)
    assert (socket.events, socket.sequence) == (3, 10)
    socket.close()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "wrong",
    [
        event(9),
        event(7),
        event(8, "s-2"),
        {"type": "error", "reason": "NOT_FOUND", "message": "there is no such agent"},
    ],
    ids=["a gap", "a repeat", "another stream", "a refusal"],
)
async def test_whatever_is_wrong_ends_the_measurement(edge: Edge, wrong: dict[str, Any]) -> None:
    socket = await opened(edge)
    edge.say(wrong)
    with pytest.raises(StreamBroken):
        await socket.until_runs_ended(1, 5)
    socket.close()


@pytest.mark.asyncio
async def test_a_connection_that_ends_ends_the_measurement(edge: Edge) -> None:
    socket = await opened(edge)
    assert edge.writer is not None
    edge.writer.close()
    with pytest.raises(StreamBroken):
        await socket.until_runs_ended(1, 5)


@pytest.mark.asyncio
async def test_a_frame_that_comes_in_pieces_is_one_event(edge: Edge) -> None:
    socket = await opened(edge)
    assert edge.writer is not None
    whole = frame(event(8)) + frame(event(9, kind="agent_completed"))
    for at in range(len(whole)):
        edge.writer.write(whole[at : at + 1])
        await asyncio.sleep(0)
    await socket.until_runs_ended(1, 5)
    assert socket.events == 2
    socket.close()
