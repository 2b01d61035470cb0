"""A WebSocket client that costs little, so that a load generator does not measure itself.

It knows the wire protocol and nothing of the SDK. It looks into an event only for its
`sequence` and checks that with each one: a gap, a repeat, a frame of another user's
stream ends the measurement by `StreamBroken`. Everything else is handed on as JSON.
"""

import asyncio
import base64
import json
import os
from collections import deque
from collections.abc import Callable
from typing import Any

READY_S = 30.0
_SEQUENCE = b'"sequence":'
_STREAM = b'"stream_id":"'


class StreamBroken(AssertionError):
    """What arrived is not the user's stream in order: no figure of this run counts."""


class LoadSocket(asyncio.Protocol):
    """One connection of one user. `events` counts; `on_event` gets each text, if set."""

    def __init__(self, user: str, request: bytes) -> None:
        self.user = user
        self.ready: dict[str, Any] = {}
        self.sequence = 0
        self.events = 0
        self.runs_ended = 0
        self.on_event: Callable[[bytes], None] | None = None
        self._request = request
        self._stream = b""
        self._buffer = b""
        self._upgraded = False
        self._frames: deque[dict[str, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        # Whether every event wakes who waits, or only what ends a run and other frames.
        self._eager = False
        self._notable = False
        self._broken: Exception | None = None

    # ---- what measurements use

    def send(self, message_id: str, content: str, agent: str) -> None:
        """Send a user_message."""
        message = {"type": "user_message", "id": message_id, "content": content, "agent": agent}
        self._transport.write(_masked(0x81, json.dumps(message).encode()))

    async def frame(self, kind: str, timeout_s: float = READY_S) -> dict[str, Any]:
        """The next frame of a type that is no event (`ready`, `accepted`)."""
        async with asyncio.timeout(timeout_s):
            while True:
                while self._frames:
                    frame = self._frames.popleft()
                    if frame["type"] == kind:
                        return frame
                await self._next()

    async def until_runs_ended(self, count: int, timeout_s: float) -> None:
        """Wait until so many agent_completed have come."""
        async with asyncio.timeout(timeout_s):
            while self.runs_ended < count:
                await self._next()

    async def until_event(self, after: int, timeout_s: float) -> None:
        """Wait for an event with a sequence over `after`."""
        self._eager = True
        try:
            async with asyncio.timeout(timeout_s):
                while self.sequence <= after:
                    await self._next()
        finally:
            self._eager = False

    def close(self) -> None:
        """Drop the connection. Safe to call twice."""
        self._transport.abort()

    async def _next(self) -> None:
        if self._broken is not None:
            raise self._broken
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._broken is not None:
            raise self._broken

    # ---- the wire

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data if self._buffer else data
        if not self._upgraded:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._buffer = head
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self._break(StreamBroken(f"refused: {head[:80]!r} {data[:200]!r}"))
                return
            self._upgraded = True
        at, have = 0, len(data)
        while have - at >= 2:
            size, begin = data[at + 1], at + 2
            if size == 126:
                begin = at + 4
                size = int.from_bytes(data[at + 2 : begin], "big")
            elif size == 127:
                begin = at + 10
                size = int.from_bytes(data[at + 2 : begin], "big")
            end_at = begin + size
            if end_at > have:
                break
            opcode = data[at] & 15
            if opcode == 1:
                self._text(data[begin:end_at])
            elif opcode == 9:
                self._transport.write(_masked(0x8A, data[begin:end_at]))
            elif opcode == 8:
                code = int.from_bytes(data[begin : begin + 2], "big")
                self._break(StreamBroken(f"{self.user} was closed with {code}"))
            at = end_at
        self._buffer = data[at:]
        if self._notable or self._eager:
            self._notable = False
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._break(StreamBroken(f"the connection of {self.user} ended: {exc}"))

    def _text(self, text: bytes) -> None:
        # An event begins with its type, stream and sequence, in this order.
        at = text.find(_STREAM, 0, 48)
        if at < 0 or text.startswith(b'{"type":"ready"'):
            self._message(json.loads(text))
            return
        at += len(_STREAM)
        number = text.index(_SEQUENCE, at) + len(_SEQUENCE)
        sequence = int(text[number : text.index(b",", number)])
        if sequence != self.sequence + 1:
            self._break(StreamBroken(f"{self.user} got {sequence} after {self.sequence}"))
        if not text.startswith(self._stream, at):
            self._break(StreamBroken(f"{self.user} got an event of another stream"))
        self.sequence = sequence
        self.events += 1
        if text.startswith(b'{"type":"agent_completed"'):
            self.runs_ended += 1
            self._notable = True
        if self.on_event is not None:
            self.on_event(text)

    def _message(self, frame: dict[str, Any]) -> None:
        if frame["type"] == "ready":
            self.ready = frame
            self.sequence = frame["sequence"]
            self._stream = frame["stream_id"].encode() + b'"'
        elif frame["type"] == "error":
            why = f"{frame['reason']}, {frame['message']}"
            self._break(StreamBroken(f"{self.user} was refused: {why}"))
        self._frames.append(frame)
        self._notable = True

    def _break(self, error: Exception) -> None:
        if self._broken is None:
            self._broken = error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


async def connect(address: str, user: str, token: str, secure: bool = False) -> LoadSocket:
    """Open a connection to the edge at `host:port` and wait for its `ready`.

    Raises StreamBroken when it is refused, OSError when nobody is there, TimeoutError.
    """
    host, _, port = address.rpartition(":")
    key = base64.b64encode(os.urandom(16)).decode()
    request = (
        f"GET /v1/connect HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
        f"Sec-WebSocket-Protocol: steward.v1\r\nAuthorization: Bearer {token}\r\n\r\n"
    ).encode()
    loop = asyncio.get_running_loop()
    _, socket = await loop.create_connection(
        lambda: LoadSocket(user, request), host.strip("[]"), int(port), ssl=secure or None
    )
    await socket.frame("ready")
    return socket


def _masked(first: int, payload: bytes) -> bytes:
    """A client's frame with a mask of zeros, which is one."""
    size = len(payload)
    if size < 126:
        return bytes((first, 0x80 | size)) + b"\0\0\0\0" + payload
    return bytes((first, 0xFE)) + size.to_bytes(2, "big") + b"\0\0\0\0" + payload
