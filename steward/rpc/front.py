"""The port of a process that speaks two ways: framed connections of peers, and gRPC for all else.

Both on one port, so that a process has one address, whoever has to know it: settings, manifests,
firewalls. The first bytes of a connection tell which it is. What is HTTP/2 is passed on,
unread, to the gRPC server of this process on the loopback device. It checks nobody: the gRPC
server and the framed connections do. A connection that has not said what it is after
`FIRST_BYTES_S` is closed, as is one that says anything else.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from steward.rpc.frames import FrameConnection

HTTP2 = b"PRI * HTTP/2.0"
FIRST_BYTES_S = 5.0
LOOPBACK = "127.0.0.1"


class Front:
    """Listens for a process. `open` before all else."""

    def __init__(
        self, preface: bytes, framed: Callable[[], FrameConnection], grpc_port: int
    ) -> None:
        """`framed` makes a framed connection, from behind the `preface`."""
        self.preface = preface
        self._framed = framed
        self._grpc_port = grpc_port
        self._open: set[_Unknown | _Leg] = set()
        self._dials: set[asyncio.Task[None]] = set()

    async def open(self, host: str, port: int, *, serving: bool = True) -> int:
        """Take the port, and listen unless told not to; the port. Raises OSError."""
        loop = asyncio.get_running_loop()
        # The supervisor keeps the port reserved under the same option (docs/decisions/0002).
        self._server = await loop.create_server(
            lambda: _Unknown(self), host, port, reuse_port=True, start_serving=serving
        )
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def serve(self) -> None:
        """Listen, after an `open` that was told not to."""
        await self._server.start_serving()

    def stop_listening(self) -> None:
        """Take no new connection. Safe to call twice."""
        self._server.close()

    async def close(self) -> None:
        """End what is open. Framed connections are their owner's affair. Safe to call twice."""
        self._server.close()
        for task in self._dials:
            task.cancel()
        if self._dials:
            await asyncio.wait(set(self._dials))
        for connection in list(self._open):
            connection.transport.abort()

    def opened(self, connection: "_Unknown | _Leg") -> None:
        self._open.add(connection)

    def gone(self, connection: "_Unknown | _Leg") -> None:
        self._open.discard(connection)

    def take_framed(self, transport: asyncio.Transport, rest: bytes) -> None:
        """A peer: from here on it is talked to without gRPC."""
        connection = self._framed()
        # One that reads into a buffer of its own is not taken over in the middle of reading.
        transport.pause_reading()
        transport.set_protocol(connection)
        connection.connection_made(transport)
        transport.resume_reading()
        if rest:
            connection.data_received(rest)

    def take_http2(self, transport: asyncio.Transport, head: bytes) -> None:
        """Somebody who speaks gRPC."""
        transport.pause_reading()
        task = asyncio.get_running_loop().create_task(self._dial(transport, head))
        self._dials.add(task)
        task.add_done_callback(self._dials.discard)

    async def _dial(self, outer: asyncio.Transport, head: bytes) -> None:
        loop = asyncio.get_running_loop()
        leg = _Leg(self, outer)
        try:
            async with asyncio.timeout(FIRST_BYTES_S):
                inner, _ = await loop.create_connection(lambda: leg, LOOPBACK, self._grpc_port)
        except (OSError, TimeoutError):
            outer.abort()
            return
        if outer.is_closing():
            inner.abort()
            return
        back = _Leg(self, inner)
        outer.set_protocol(back)
        back.connection_made(outer)
        inner.write(head)
        outer.resume_reading()


class _Unknown(asyncio.Protocol):
    """A connection that has not said yet what it is."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._front.opened(self)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(FIRST_BYTES_S, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        head = self._head = self._head + data
        preface = self._front.preface
        if head.startswith(preface):
            self._known()
            self._front.take_framed(self.transport, head[len(preface) :])
        elif head.startswith(HTTP2):
            self._known()
            self._front.take_http2(self.transport, head)
        elif not (preface.startswith(head) or HTTP2.startswith(head)):
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._known()

    def _known(self) -> None:
        self._deadline.cancel()
        self._front.gone(self)


class _Leg(asyncio.Protocol):
    """One of the two connections of a relay: what it hears, `other` gets, at the other's pace."""

    def __init__(self, front: Front, other: asyncio.Transport) -> None:
        self._front = front
        self._other = other

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._front.opened(self)

    def data_received(self, data: bytes) -> None:
        self._other.write(data)

    def pause_writing(self) -> None:
        self._other.pause_reading()

    def resume_writing(self) -> None:
        self._other.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._front.gone(self)
        self._other.close()
