"""Thousands of WebSocket clients on one epoll, for measuring an edge.

Plain sockets without tasks or protocol objects, so that 10,000 of them fit beside an edge
on one core. Each checks its handshake, its `ready`, and the sequence of every event; what
is wrong with one ends the measurement. At most `WINDOW` handshakes are under way at once, and
half of them begin together: clients that lost their edge come in crowds.
"""

import select
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from types import TracebackType
from typing import Self

WINDOW = 256
STEP_S = 30.0
READ_BYTES = 1 << 18
SOURCES = 4
"""Addresses 127.0.0.x that clients come from: each has ports of its own."""

_SEQUENCE = b'"sequence":'
_KEY = "dGhlIHNhbXBsZSBub25jZQ=="
_ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
_MASK = b"\x5a\x01\xc3\x7e"
_CLOSE = b"\x88\x82" + _MASK + bytes(a ^ b for a, b in zip(b"\x03\xe8", _MASK, strict=False))
_PONG = b"\x8a\x80" + _MASK
_BIND_ADDRESS_NO_PORT = 24


class ClientBroken(AssertionError):
    """A client got what it must not get: no figure of this run counts."""


class Client:
    """One connection. `sequence` is that of its last event."""

    __slots__ = ("buffer", "events", "pongs", "ready", "sequence", "sock", "upgraded", "user")

    def __init__(self, user: str, sock: socket.socket) -> None:
        self.user = user
        self.sock = sock
        self.buffer = b""
        self.upgraded = False
        self.ready = False
        self.sequence = 0
        self.pongs = 0
        # Events that nobody has counted yet.
        self.events = 0

    def take(self, data: bytes) -> None:
        """Read what came. Raises ClientBroken."""
        if self.buffer:
            data = self.buffer + data
        if not self.upgraded:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self.buffer = head
                return
            if not head.startswith(b"HTTP/1.1 101") or _ACCEPT not in head:
                raise ClientBroken(f"{self.user} was refused: {head[:60]!r} {data[:120]!r}")
            self.upgraded = True
        at, have = 0, len(data)
        while have - at >= 2:
            size, begin = data[at + 1], at + 2
            if size == 126:
                begin = at + 4
                size = int.from_bytes(data[at + 2 : begin], "big")
            if begin + size > have:
                break
            if data[at] == 0x81:
                self._text(data, begin, begin + size)
            elif data[at] == 0x88:
                code = int.from_bytes(data[begin : begin + 2], "big")
                raise ClientBroken(f"{self.user} was closed with {code}")
            elif data[at] == 0x89:
                self.sock.send(_PONG)
            at = begin + size
        self.buffer = data[at:]

    def _text(self, data: bytes, begin: int, end: int) -> None:
        if data.startswith(b'{"type":"pong"', begin):
            self.pongs += 1
            return
        if data.startswith(b'{"type":"heartbeat"', begin):
            return
        number = data.find(_SEQUENCE, begin, end) + len(_SEQUENCE)
        if number < begin:
            raise ClientBroken(f"{self.user} got {data[begin:end][:120]!r}")
        sequence = int(data[number : data.index(b",", number)])
        if data.startswith(b'{"type":"ready"', begin):
            self.ready = True
            self.sequence = sequence
            return
        if sequence != self.sequence + 1:
            raise ClientBroken(f"{self.user} got {sequence} after {self.sequence}")
        self.sequence = sequence
        self.events += 1


class Clients:
    """All clients of one measurement, driven by who calls."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._epoll = select.epoll()
        self._by_fd: dict[int, Client] = {}
        self._opened = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._by_fd)

    def open(self, tokens: Iterable[tuple[str, str]]) -> list[Client]:
        """Connect one client for each (user, token) and wait until all are `ready`."""
        todo = iter(tokens)
        opened: list[Client] = []
        waiting: set[Client] = set()
        deadline = time.monotonic() + STEP_S
        while True:
            if len(waiting) <= WINDOW // 2:
                for user, token in islice(todo, WINDOW // 2):
                    client = self._connect(user, token)
                    opened.append(client)
                    waiting.add(client)
                deadline = time.monotonic() + STEP_S
            if not waiting:
                return opened
            for client in self._poll(deadline):
                if client.ready:
                    waiting.discard(client)

    def read(self, events: int) -> None:
        """Read until so many events more have come, in all."""
        deadline = time.monotonic() + STEP_S
        while events > 0:
            for client in self._poll(deadline):
                events -= client.events
                client.events = 0
        if events:
            raise ClientBroken(f"{-events} events too many")

    def ping(self, message: bytes, each: int) -> None:
        """Every client sends `message` so often, the next one when its pong is there."""
        frame = masked_text(message)
        waiting = set(self._by_fd.values())
        for client in waiting:
            client.pongs = 0
            client.sock.send(frame)
        deadline = time.monotonic() + STEP_S
        while waiting:
            for client in self._poll(deadline):
                if client.pongs >= each:
                    waiting.discard(client)
                else:
                    client.sock.send(frame)

    def leave(self, clients: Iterable[Client]) -> None:
        """Close: every second one without a word, the others with a close frame first."""
        for number, client in enumerate(clients):
            sock = client.sock
            del self._by_fd[sock.fileno()]
            self._epoll.unregister(sock)
            if number % 2:
                sock.send(_CLOSE)
            else:
                # Reset: what a crashed client or a lost network looks like.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()

    def close(self) -> None:
        """Drop all. Safe to call twice."""
        for client in self._by_fd.values():
            client.sock.close()
        self._by_fd.clear()

    def _connect(self, user: str, token: str) -> Client:
        sock = socket.socket()
        self._opened += 1
        sock.setsockopt(socket.SOL_IP, _BIND_ADDRESS_NO_PORT, 1)
        sock.bind((f"127.0.0.{self._opened % SOURCES + 1}", 0))
        sock.connect(("127.0.0.1", self._port))
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.send(
            f"GET /v1/connect HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {_KEY}\r\n"
            f"Authorization: Bearer {token}\r\n\r\n".encode()
        )
        client = Client(user, sock)
        self._by_fd[sock.fileno()] = client
        self._epoll.register(sock, select.EPOLLIN)
        return client

    def _poll(self, deadline: float) -> Iterator[Client]:
        """Clients that got something, after they have read it. Raises ClientBroken."""
        found = self._epoll.poll(1.0, 512)
        if not found and time.monotonic() > deadline:
            raise ClientBroken(f"nothing came for {STEP_S:g} s")
        for fd, _ in found:
            client = self._by_fd[fd]
            data = client.sock.recv(READ_BYTES)
            if not data:
                raise ClientBroken(f"the connection of {client.user} ended")
            client.take(data)
            yield client


def masked_text(payload: bytes) -> bytes:
    """A client's text frame, masked with a mask that is not zero: the edge must unmask."""
    size = len(payload)
    head = bytes((0x81, 0x80 | size)) if size < 126 else b"\x81\xfe" + size.to_bytes(2, "big")
    mixed = bytes(byte ^ _MASK[at % 4] for at, byte in enumerate(payload))
    return head + _MASK + mixed
