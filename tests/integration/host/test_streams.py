"""The stream of an edge on real wires, framed and as gRPC: the same contract in two carriers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent_service import framed
from agent_service.core.effects import Deliver
from agent_service.edge_streams import EdgeStreams
from agent_service.framed import PREFACE, FramedEdges
from agent_service.log.memory import MemoryLog
from agent_service.server import ALLOWED, AgentServicer
from edge.uplink.carriers import PREFACE as PREFACE_OF_EDGES
from steward.errors import Reason
from steward.model.keys import Epoch, Sequence, UserKey
from steward.rpc.factory import MAX_MESSAGE_BYTES, make_channel, make_server
from steward.rpc.frame_guard import MOST_HELLO_BYTES
from steward.rpc.frames import LENGTH_BYTES, TAILED
from steward.rpc.front import LOOPBACK, Front
from steward.rpc.roles import Role, RoleCredentials, RoleVerifier
from steward.rpc.status import error_of
from steward.v1 import agent_service_pb2 as pb
from steward.v1 import placement_pb2
from steward.v1.agent_service_pb2_grpc import (
    AgentServiceStub,
    add_AgentServiceServicer_to_server,
)

pytestmark = pytest.mark.asyncio
ALICE = UserKey("default", "alice")
USER = placement_pb2.UserKey(tenant_id=ALICE.tenant, user_id=ALICE.user)
BOUND_S = 5.0
CHANNEL = 7


class Wire(Protocol):
    """One way to talk to a node."""

    async def say(self, request: pb.HoldEdgeStreamRequest) -> None: ...

    async def read(self) -> pb.HoldEdgeStreamResponse | None:
        """The next message; None at the end."""
        ...

    async def refusal(self) -> Reason:
        """Why the node ends the stream."""
        ...


class GrpcWire:
    def __init__(self, stub: Any, token: str) -> None:
        self.call = stub.HoldEdgeStream(metadata=(("authorization", f"Bearer {token}"),))

    async def say(self, request: pb.HoldEdgeStreamRequest) -> None:
        await self.call.write(request)

    async def read(self) -> pb.HoldEdgeStreamResponse | None:
        message = await asyncio.wait_for(self.call.read(), BOUND_S)
        return None if message is grpc.aio.EOF else message

    async def refusal(self) -> Reason:
        try:
            while await self.read() is not None:
                pass
        except grpc.RpcError as failure:
            return error_of(failure).reason
        raise AssertionError("it ended without a reason")


class FramedWire:
    """Bytes on a socket. `tails` are those of the messages that had one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.token = ""
        self.tails: list[bytes] = []

    async def say(self, request: pb.HoldEdgeStreamRequest) -> None:
        if request.HasField("hello"):
            request.hello.role_token = self.token
        message = request.SerializeToString()
        self.writer.write(len(message).to_bytes(LENGTH_BYTES, "big") + message)

    async def read(self) -> pb.HoldEdgeStreamResponse | None:
        async with asyncio.timeout(BOUND_S):
            try:
                size = await self._length()
                if size & TAILED:
                    size -= TAILED
                    message = await self.reader.readexactly(inner := await self._length())
                    tail = await self.reader.readexactly(size - LENGTH_BYTES - inner)
                    self.tails.append(tail)
                else:
                    message = await self.reader.readexactly(size)
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
        return pb.HoldEdgeStreamResponse.FromString(message)

    async def _length(self) -> int:
        return int.from_bytes(await self.reader.readexactly(LENGTH_BYTES), "big")

    async def refusal(self) -> Reason:
        last = None
        while (message := await self.read()) is not None:
            last = message
        if last is None or not last.HasField("refused"):
            raise AssertionError("it ended without a reason")
        return Reason(last.refused.reason)


class Served:
    """A node behind its port, as the process has it."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.key = Ed25519PrivateKey.generate()
        verifier = RoleVerifier(self.key, "test")
        self.streams = EdgeStreams(node.host, "test")
        self.streams.incarnation = node.incarnation
        self.edges = FramedEdges(self.streams, verifier)
        self.server = make_server(verifier, ALLOWED)
        servicer = AgentServicer(node.host, MemoryLog(), self.streams)
        add_AgentServiceServicer_to_server(servicer, self.server)
        grpc_port = self.server.add_insecure_port(f"{LOOPBACK}:0")
        self.front = Front(PREFACE, self.edges.accept, grpc_port)
        self.port = 0

    def token(self, role: Role = Role.EDGE, cluster: str = "test") -> str:
        return RoleCredentials(self.key, role, cluster, "edge-0").token()

    @asynccontextmanager
    async def dialled(self, carrier: str, token: str | None = None) -> AsyncIterator[Any]:
        """A wire that has said nothing yet."""
        token = self.token() if token is None else token
        if carrier == "grpc":
            async with make_channel(f"{LOOPBACK}:{self.port}") as channel:
                wire = GrpcWire(AgentServiceStub(channel), token)
                yield wire
                wire.call.cancel()
            return
        reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
        writer.write(PREFACE)
        framed_wire = FramedWire(reader, writer)
        framed_wire.token = token
        try:
            yield framed_wire
        finally:
            writer.transport.abort()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    @asynccontextmanager
    async def greeted(self, carrier: str) -> AsyncIterator[Any]:
        """A wire that has had its welcome."""
        async with self.dialled(carrier) as wire:
            await wire.say(hello())
            message = await wire.read()
            assert message is not None and message.welcome.node_id == "node-0"
            yield wire


def hello(**more: Any) -> pb.HoldEdgeStreamRequest:
    fields = {"cluster": "test", "edge_id": "edge-0"} | more
    return pb.HoldEdgeStreamRequest(hello=pb.EdgeStreamHello(**fields))


def attach(epoch: int, channel: int = 0) -> pb.HoldEdgeStreamRequest:
    command = pb.EdgeCommand(
        user=USER, epoch=epoch, command_id=1, attach=pb.Attach(channel=channel)
    )
    return pb.HoldEdgeStreamRequest(commands=pb.CommandBatch(commands=[command]))


def probe(number: int) -> pb.HoldEdgeStreamRequest:
    return pb.HoldEdgeStreamRequest(probe=pb.StreamProbe(number=number))


def message(text: str) -> pb.HoldEdgeStreamRequest:
    submit = pb.SubmitMessage(id=text, content=f'"{text}"'.encode())
    command = pb.EdgeCommand(user=USER, epoch=7, command_id=2, submit_message=submit)
    return pb.HoldEdgeStreamRequest(commands=pb.CommandBatch(commands=[command]))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND_S):
        while not condition():
            await asyncio.sleep(0.005)


@pytest_asyncio.fixture
async def served(make_node: Any) -> AsyncIterator[Served]:
    served = Served(make_node(MemoryLog()))
    await served.server.start()
    served.port = await served.front.open(LOOPBACK, 0)
    try:
        yield served
    finally:
        served.front.stop_listening()
        await served.edges.close(0)
        await served.server.stop(0)
        await served.front.close()


@pytest.fixture(params=["framed", "grpc"])
def carrier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_a_probe_comes_back_behind_the_answers_that_were_before_it(
    served: Served, carrier: str
) -> None:
    served.node.place(7)
    async with served.greeted(carrier) as edge:
        await edge.say(attach(7))
        assert (await edge.read()).batch.answers[0].attached.stream_id
        await edge.say(attach(7))
        await edge.say(probe(5))
        seen: list[str] = []
        while "probe 5" not in seen:
            batch = (await edge.read()).batch
            seen += ["attached" for _ in batch.answers]
            seen += [f"probe {number}" for number in batch.probes]
        assert seen == ["attached", "probe 5"]


async def test_what_waits_in_a_stream_when_its_node_is_over_is_not_sent(
    served: Served, carrier: str
) -> None:
    served.node.place(7)
    async with served.greeted(carrier) as edge:
        await edge.say(attach(7))
        await edge.read()
        # In one turn of the loop: something is put, and then the node learns that it is over.
        (stream,) = served.streams._open
        stream.probed(1)
        served.node.host.fence("over")
        assert await edge.read() is None


async def test_a_node_that_is_over_is_asked_in_vain(served: Served, carrier: str) -> None:
    served.node.host.fence("over")
    async with make_channel(f"{LOOPBACK}:{served.port}") as channel:
        stub: Any = AgentServiceStub(channel)
        metadata = (("authorization", f"Bearer {served.token()}"),)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ReadEvents(
                pb.ReadEventsRequest(user=USER), metadata=metadata, timeout=BOUND_S
            )
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    async with served.dialled(carrier) as edge:
        await edge.say(hello())
        assert await edge.refusal() is Reason.NODE_DRAINING


async def test_only_an_edge_with_its_role_token_is_welcome(served: Served, carrier: str) -> None:
    tokens = [served.token(role) for role in Role if role is not Role.EDGE]
    for token in (*tokens, served.token(cluster="other"), "x.y.z"):
        async with served.dialled(carrier, token) as edge:
            await edge.say(hello())
            assert await edge.refusal() is Reason.PERMISSION_DENIED
    assert not served.streams._open


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (probe(1), Reason.PROTOCOL_VIOLATION),
        (attach(7), Reason.PROTOCOL_VIOLATION),
        (hello(edge_id=""), Reason.PROTOCOL_VIOLATION),
        (hello(cluster="other"), Reason.PERMISSION_DENIED),
        (hello(node_rev=1 << 40), Reason.EPOCH_STALE),
    ],
)
async def test_a_wrong_first_message_is_refused_with_its_reason(
    served: Served, carrier: str, first: pb.HoldEdgeStreamRequest, reason: Reason
) -> None:
    async with served.dialled(carrier) as edge:
        await edge.say(pb.HoldEdgeStreamRequest.FromString(first.SerializeToString()))
        assert await edge.refusal() is reason
    assert not served.streams._open


async def test_a_node_that_has_not_joined_asks_for_patience(served: Served, carrier: str) -> None:
    served.streams.incarnation = None
    async with served.dialled(carrier) as edge:
        await edge.say(hello())
        assert await edge.refusal() is Reason.NODE_DRAINING


async def test_who_says_no_hello_is_told_so_and_let_go(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framed, "HELLO_S", 0.05)
    async with served.dialled("framed") as edge:
        assert await edge.refusal() is Reason.PROTOCOL_VIOLATION


async def test_bytes_that_are_no_message_are_refused_with_the_reason(served: Served) -> None:
    async with served.dialled("framed") as edge:
        edge.writer.write((3).to_bytes(LENGTH_BYTES, "big") + b"\xff\xff\xff")
        assert await edge.refusal() is Reason.PROTOCOL_VIOLATION


async def test_a_message_that_is_too_long_ends_the_connection_unread(served: Served) -> None:
    async with served.dialled("framed") as edge:
        edge.writer.write((MOST_HELLO_BYTES + 1).to_bytes(LENGTH_BYTES, "big"))
        assert await edge.read() is None
    async with served.greeted("framed") as edge:
        edge.writer.write((MAX_MESSAGE_BYTES + 1).to_bytes(LENGTH_BYTES, "big"))
        assert await edge.read() is None
    await until(lambda: not served.streams._open)


async def test_an_edge_that_says_nothing_any_more_is_let_go(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framed, "SILENT_S", 0.1)
    async with served.greeted("framed") as edge:
        for number in range(1, 6):
            await asyncio.sleep(0.05)
            await edge.say(probe(number))
            assert list((await edge.read()).batch.probes) == [number], "one that talks stays"
        assert await edge.read() is None
    await until(lambda: not served.streams._open)


async def test_an_edge_that_reads_nothing_costs_bounded_memory_and_is_let_go(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_service.edge_streams.MOST_UNSENT_BYTES", 4 * 1024 * 1024)
    served.node.place(7)
    async with served.greeted("framed") as slow, served.greeted("framed") as other:
        (stream, _) = sorted(served.streams._open, key=lambda one: one.edge_id)
        event = b"x" * 65_536
        answered = 0
        while not stream.outbox.closed:
            assert stream._unsent_bytes <= 4 * 1024 * 1024
            answered += 1
            assert answered < 2_000, "a hundred megabytes wait for an edge that reads nothing"
            _deliver(stream, answered, event)
            await asyncio.sleep(0)
        await until(lambda: len(served.streams._open) == 1)
        await other.say(probe(1))
        assert list((await other.read()).batch.probes) == [1], "nobody else is"
        assert stream.overflowed
        slow.writer.transport.abort()


def _deliver(stream: Any, sequence: int, event: bytes) -> None:
    number = Sequence(sequence)
    stream.deliver(ALICE, Epoch(7), Deliver((stream.edge_id,), number, number, (event,)))


async def test_what_an_edge_did_not_read_in_time_comes_when_it_reads(served: Served) -> None:
    served.node.place(7)
    async with served.greeted("framed") as edge:
        edge.writer.transport.pause_reading()
        (stream,) = served.streams._open
        for sequence in range(1, 1001):
            _deliver(stream, sequence, b"x" * 50_000)
        await until(lambda: 0 < len(stream.outbox) < 1000)
        edge.writer.transport.resume_reading()
        got: list[int] = []
        while len(got) < 1000:
            batch = (await edge.read()).batch
            got += [delivery.first_sequence for delivery in batch.deliveries]
        assert got == list(range(1, 1001))


async def test_what_was_taken_for_an_edge_before_its_node_was_over_is_not_sent(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served.greeted("framed") as edge:
        edge.writer.transport.pause_reading()
        (stream,) = served.streams._open
        for sequence in range(1, 1001):
            _deliver(stream, sequence, b"x" * 50_000)
        await until(lambda: 0 < len(stream.outbox) < 1000)
        # Not told to anybody: whoever has something in hand has to ask.
        monkeypatch.setattr(served.node.host, "is_silent", lambda: True)
        edge.writer.transport.resume_reading()
        got = 0
        while (answer := await edge.read()) is not None:
            got += len(answer.batch.deliveries)
        assert got < 1000 - len(stream.outbox)


async def test_an_edge_on_each_carrier_gets_the_same_events_of_one_node(served: Served) -> None:
    served.node.place(7)
    async with served.greeted("framed") as one, served.greeted("grpc") as other:
        for edge in (one, other):
            await edge.say(attach(7, CHANNEL))
            assert (await edge.read()).batch.answers[0].attached.stream_id
        await one.say(message("hello"))
        seen: dict[str, bytes] = {}
        for name, edge in (("framed", one), ("grpc", other)):
            frames = b""
            while b"agent_completed" not in frames:
                batch = (await edge.read()).batch
                assert name == "grpc" or not batch.frames, "they travel behind the message"
                frames += batch.frames + b"".join(getattr(edge, "tails", []))
                getattr(edge, "tails", []).clear()
            seen[name] = frames
        assert seen["framed"] == seen["grpc"]


async def test_streams_that_are_ended_say_first_what_waits(served: Served, carrier: str) -> None:
    async with served.greeted(carrier) as edge:
        await until(lambda: len(served.streams._open) == 1)
        (stream,) = served.streams._open
        for number in range(1, 101):
            stream.probed(number)
        served.streams.end()
        got: list[int] = []
        while (answer := await edge.read()) is not None:
            got += answer.batch.probes
        assert got == list(range(1, 101))


async def test_a_stranger_on_the_port_is_hung_up_on(served: Served) -> None:
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"steward-log/1\n"):
        reader, writer = await asyncio.open_connection(LOOPBACK, served.port)
        writer.write(words)
        assert await asyncio.wait_for(reader.read(), BOUND_S / 2) == b""
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def test_both_ends_begin_a_framed_connection_alike() -> None:
    # Services never import each other: what both have to know is compared here.
    assert PREFACE == PREFACE_OF_EDGES
