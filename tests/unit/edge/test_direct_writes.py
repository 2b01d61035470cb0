"""Frames that go straight to the socket: the order, the close and the bound stay what they were.

A real hub with peers in memory, on real loopback sockets whose buffers are small, so that
writes are partial or refused all the time.
"""

import asyncio
import datetime
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Self, cast

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from prometheus_client import CollectorRegistry

from edge.core.commands import Delivery
from edge.core.resume import ResumePoint
from edge.core.server_messages import Limits
from edge.core.session_values import End
from edge.host.connection import Connection
from edge.host.direct import NONE, descriptor_of, write_through
from edge.host.hub import Hub, HubSettings
from edge.uplink.memory import MemoryAuth, MemoryCluster, MemoryNodes, MemoryRegistry
from steward.errors import ERRORS, Reason
from steward.model.deliveries import HEAD, encode_text, encode_texts, user_check
from steward.model.identity import Identity
from steward.model.keys import UserKey
from steward.runtime.clock import wall_ms
from steward.telemetry.catalog import EdgeMetrics
from steward.telemetry.tracing import Tracing

USER = UserKey("default", "alice")
LIMIT = 128 * 1024
SMALL = 8 * 1024
DEADLINE_S = 10.0

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}


@pytest.fixture(params=sorted(LOOPS))
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Awaitable[None]], None]]:
    """Runs a coroutine on a loop of each kind, within a deadline."""
    with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:

        async def bounded(work: Awaitable[None]) -> None:
            async with asyncio.timeout(DEADLINE_S):
                await work

        yield lambda work: runner.run(bounded(work))


class Held(asyncio.Protocol):
    """Keeps the transport of whoever connects, until a hub takes it over."""

    def __init__(self, made: "asyncio.Future[asyncio.Transport]") -> None:
        self._made = made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A transport of uvloop is no instance of asyncio's.
        self._made.set_result(cast(asyncio.Transport, transport))


class Bench:
    """One live WebSocket connection of a hub, and the client's end of its socket."""

    def __init__(self) -> None:
        self.hub = Hub(
            HubSettings(Limits(65_536, 600, 10, 60_000), 10, LIMIT, 0, 0),
            EdgeMetrics(CollectorRegistry()),
            Tracing(),
        )
        self.cluster = MemoryCluster()
        self.cluster.add_node("node-1")
        self.hub.registry = MemoryRegistry(self.cluster, self.hub)
        self.hub.auth = MemoryAuth()
        self.hub.nodes = MemoryNodes(self.cluster, self.hub)
        self.last = 0
        self._packed = False

    async def __aenter__(self) -> Self:
        self.hub.start()
        loop = asyncio.get_running_loop()
        made: asyncio.Future[asyncio.Transport] = loop.create_future()
        listener = socket.create_server(("127.0.0.1", 0))
        # Inherited by what is accepted.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        server = await loop.create_server(lambda: Held(made), sock=listener)
        self.client = socket.socket()
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        self.client.setblocking(False)
        await loop.sock_connect(self.client, server.sockets[0].getsockname())
        self.transport = await made
        server.close()
        hour_ms = 3_600_000
        identity = Identity(USER, (), wall_ms() + hour_ms, wall_ms(), "t")
        self.connection: Connection = self.hub.connect(
            self.transport, identity, ResumePoint(), "", websocket=True
        )
        while self.connection.session.next == 0 or not self._live:
            await asyncio.sleep(0)
        assert b'"ready"' in await loop.sock_recv(self.client, 65_536)
        self.last = self.connection.session.next - 1
        return self

    @property
    def _live(self) -> bool:
        return self.connection.session.state.name == "LIVE"

    async def __aexit__(self, *_: object) -> None:
        self.connection.abort()
        self.client.close()
        await self.hub.close()
        await asyncio.sleep(0)

    def deliver(self, events: list[bytes]) -> None:
        """Deliver the next events as they come off a node's stream, in either form by turns."""
        (source,) = self.cluster.nodes
        epoch = self.cluster.placements[USER].epoch
        first = self.last + 1
        self._packed = not self._packed
        if self._packed:
            frames = encode_texts(events)
            channel, check = self.hub._audiences.by_user[USER].channel, user_check(USER)
            head = HEAD.pack(channel, epoch, first, len(events), len(frames), check)
            self.hub.delivered_packed(source, head, frames)
        else:
            self.hub.delivered(source, [Delivery(USER, epoch, first, events)])
        self.last += len(events)

    async def read(self, size: int) -> bytes:
        """Exactly `size` bytes of what the client gets."""
        loop = asyncio.get_running_loop()
        got = bytearray()
        while len(got) < size:
            data = await loop.sock_recv(self.client, size - len(got))
            assert data, "the connection ended early"
            got += data
        return bytes(got)

    async def read_all(self) -> bytes:
        """Everything until the connection ends."""
        loop = asyncio.get_running_loop()
        got = bytearray()
        while data := await loop.sock_recv(self.client, 65_536):
            got += data
        return bytes(got)


def expect(got: bytes, sent: bytes | bytearray) -> None:
    """Compares, without the picture of a difference that pytest would draw for minutes."""
    same = got == sent
    assert same, f"{len(got)} bytes are not the {len(sent)} that were sent"


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def event(number: int, size: int = 500) -> bytes:
    return b"%d:" % number + b"x" * size


def test_events_arrive_in_order_through_partial_writes(
    run: Callable[[Awaitable[None]], None],
) -> None:
    async def work() -> None:
        async with Bench() as bench:
            sent = bytearray()
            held_back = False
            for number in range(2_000):
                some = [event(number, 300 + number % 700)]
                bench.deliver(some)
                sent += encode_text(some[0])
                await asyncio.sleep(0)
                unsent = bench.transport.get_write_buffer_size()
                held_back = held_back or unsent > 0
                if unsent > LIMIT // 2 or number % 50 == 0:
                    # A part, so that the socket has room while the transport holds bytes back.
                    some_of_it = len(sent) * 2 // 3
                    expect(await bench.read(some_of_it), sent[:some_of_it])
                    del sent[:some_of_it]
            assert held_back, "the socket never refused anything: nothing was tested"
            expect(await bench.read(len(sent)), sent)

    run(work())


def test_a_close_comes_behind_all_that_was_unsent(
    run: Callable[[Awaitable[None]], None],
) -> None:
    async def work() -> None:
        async with Bench() as bench:
            sent = bytearray()
            while bench.transport.get_write_buffer_size() < LIMIT // 4:
                some = [event(bench.last)]
                bench.deliver(some)
                sent += encode_text(some[0])
                await asyncio.sleep(0)
            bench.connection.handle(End(Reason.CONNECTION_REPLACED))
            bench.connection.finish()
            got = await bench.read_all()
            expect(got[: len(sent)], sent)
            code = ERRORS[Reason.CONNECTION_REPLACED].close_code
            assert code is not None
            assert got[len(sent) + 2 :].startswith(code.to_bytes(2, "big"))

    run(work())


def test_a_slow_reader_ends_at_the_bound_and_not_before(
    run: Callable[[Awaitable[None]], None],
) -> None:
    async def work() -> None:
        async with Bench() as bench:
            size = len(encode_text(event(1)))
            unsent = 0
            while not bench.connection.session.closing:
                unsent = bench.transport.get_write_buffer_size()
                bench.deliver([event(1)])
                await asyncio.sleep(0)
            # The last look before the end found it over the bound, by one event at most.
            assert LIMIT < unsent <= LIMIT + size + 10

    run(work())


def test_nothing_is_written_to_a_descriptor_that_is_somebody_elses_by_now(
    run: Callable[[Awaitable[None]], None],
) -> None:
    async def work() -> None:
        async with Bench() as bench:
            descriptor = descriptor_of(bench.transport)
            bench.transport.abort()
            # Aborted, but not over: the descriptor is still open.
            bench.connection.write(b"too late")
            while is_open(descriptor):
                await asyncio.sleep(0)
            ours, theirs = socket.socketpair()
            if theirs.fileno() == descriptor:
                ours, theirs = theirs, ours
            if ours.fileno() != descriptor:
                os.dup2(ours.fileno(), descriptor)
            theirs.setblocking(False)
            bench.connection.write(b"far too late")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            with pytest.raises(BlockingIOError):
                theirs.recv(100)
            if ours.fileno() != descriptor:
                os.close(descriptor)
            ours.close()
            theirs.close()

    run(work())


def test_a_broken_socket_is_left_to_the_transport(
    run: Callable[[Awaitable[None]], None],
) -> None:
    async def work() -> None:
        async with Bench() as bench:
            # The peer is gone by a reset, which the transport has not read yet.
            bench.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            bench.client.close()
            write_through(bench.transport, descriptor_of(bench.transport), b"to nobody")
            while bench.connection.transport is not None:
                await asyncio.sleep(0)
            assert bench.hub.connections == 0

    run(work())


def test_a_tls_transport_is_never_written_around(
    run: Callable[[Awaitable[None]], None], tmp_path: Path
) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        made: asyncio.Future[asyncio.Transport] = loop.create_future()
        server = await loop.create_server(
            lambda: Held(made), "127.0.0.1", 0, ssl=_server_context(tmp_path)
        )
        client = ssl.create_default_context()
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        host, port = server.sockets[0].getsockname()
        ours, _ = await loop.create_connection(asyncio.Protocol, host, port, ssl=client)
        theirs = await made
        assert descriptor_of(theirs) == NONE
        ours.abort()
        theirs.abort()
        server.close()
        await server.wait_closed()

    run(work())


def _server_context(folder: Path) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, plain)
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context
