"""`SlowReader`: one WebSocket client that reads all, little or nothing, and checks what it reads.

Its socket looks like one far away: small segments and a small receive buffer, so that what it
does not read stays at the server. Every event must go on where the one before ended, be it
merged or not, and say exactly the text that belongs to its sequences.
"""

import asyncio
import json
import socket
from enum import Enum

from steward.load.wire import StreamBroken

SEGMENT_BYTES = 1400
RECEIVE_BYTES = 8192
READ_EVERY_S = 0.02
READY_S = 10.0


class Pace(Enum):
    """How much is read every `READ_EVERY_S`, in bytes."""

    ALL = 1 << 30
    LITTLE = 1024
    NOTHING = 0


class SlowReader:
    """One connection. `events` counts frames, `sequence` is the last that they stood for."""

    def __init__(self, user: str, pace: Pace) -> None:
        self.events = 0
        self.sequence = 0
        self.closed_with = 0
        self._user = user
        self._pace = pace
        self._socket = socket.socket()
        self._buffer = b""
        self._upgraded = self._ready = self._ended = False
        self._task: asyncio.Task[None] | None = None

    async def open(self, port: int, token: str, *, merge: bool) -> None:
        """Connect, read `ready`, and begin to read at the pace."""
        loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        await loop.sock_connect(self._socket, ("127.0.0.1", port))
        request = (
            f"GET /v1/connect?merge={int(merge)} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            f"Authorization: Bearer {token}\r\n\r\n"
        )
        await loop.sock_sendall(self._socket, request.encode())
        async with asyncio.timeout(READY_S):
            while not self._ready:
                self._take(await loop.sock_recv(self._socket, RECEIVE_BYTES))
        self._task = asyncio.create_task(self._read_on())

    async def finish(self) -> None:
        """Read what is left for the moment, check it, and leave."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.result()
        idle = 0
        while idle < 5 and not self._ended:
            idle = 0 if self._read(Pace.ALL.value) else idle + 1
            await asyncio.sleep(READ_EVERY_S)
        self._socket.close()

    async def _read_on(self) -> None:
        while not self._ended:
            self._read(self._pace.value)
            await asyncio.sleep(READ_EVERY_S)

    def _read(self, most: int) -> int:
        """Read up to so many bytes; how many there were."""
        taken = 0
        while taken < most and not self._ended:
            try:
                data = self._socket.recv(min(1 << 16, most - taken))
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            self._take(data)
            taken += len(data)
        return taken

    def _take(self, data: bytes) -> None:
        self._ended = not data
        data = self._buffer + data
        if not self._upgraded:
            head, end, data = data.partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 101") or not end:
                raise StreamBroken(f"refused: {head[:80]!r} {data[:200]!r}")
            self._upgraded = True
        at = 0
        while len(data) - at >= 2:
            size, begin = data[at + 1], at + 2
            if size >= 126:
                begin += 2 if size == 126 else 8
                size = int.from_bytes(data[at + 2 : begin], "big")
            if begin + size > len(data):
                break
            if data[at] == 0x81:
                self._frame(json.loads(data[begin : begin + size]))
            elif data[at] == 0x88:
                self.closed_with = int.from_bytes(data[begin : begin + 2], "big")
            at = begin + size
        self._buffer = data[at:]

    def _frame(self, frame: dict[str, object]) -> None:
        sequence = frame.get("sequence")
        assert isinstance(sequence, int)
        if frame["type"] == "ready":
            self._ready, self.sequence = True, sequence
        if "event_id" not in frame:
            return
        first, data = frame.get("from_sequence", sequence), frame["data"]
        assert isinstance(first, int) and isinstance(data, dict)
        text = "".join(f"{number} " for number in range(first, sequence + 1))
        if first != self.sequence + 1 or data["delta"] != text:
            raise StreamBroken(f"{self._user} got {first} to {sequence} after {self.sequence}")
        self.sequence = sequence
        self.events += 1
