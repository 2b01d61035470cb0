"""The framed way into the log: the same contract as the stream, and the same port as gRPC."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agent_service.core.journal import Append, Committed, Seal, Sealed, StoredEvent
from agent_service.log.framing import PREFACE
from agent_service.log.port import ReadRange
from steward.errors import Reason
from steward.model.keys import Epoch, Sequence, UserKey
from steward.rpc.factory import MAX_MESSAGE_BYTES, call_metadata, make_channel
from steward.rpc.frames import LENGTH_BYTES
from steward.rpc.front import FIRST_BYTES_S
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.v1 import log_service_pb2 as pb
from steward.v1 import log_service_pb2_grpc, placement_pb2

pytestmark = pytest.mark.asyncio
ALICE = UserKey("default", "alice")
STEP_S = 10.0


class Caller:
    """A connection to the log's port, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, **body: Any) -> None:
        frame = pb.HoldLogStreamRequest(**body).SerializeToString()
        self.writer.write(len(frame).to_bytes(LENGTH_BYTES, "big") + frame)

    async def receive(self) -> pb.HoldLogStreamResponse:
        async with asyncio.timeout(STEP_S):
            size = int.from_bytes(await self.reader.readexactly(LENGTH_BYTES), "big")
            return pb.HoldLogStreamResponse.FromString(await self.reader.readexactly(size))

    async def refused(self) -> Reason:
        """The reason of the last message, after which the log ends the connection."""
        while not (message := await self.receive()).HasField("refused"):
            pass
        await self.ended()
        return Reason(message.refused.reason)

    async def ended(self) -> bytes:
        """What came before the log ended the connection."""
        rest = b""
        async with asyncio.timeout(STEP_S):
            with contextlib.suppress(ConnectionResetError):
                rest = await self.reader.read()
        return rest


@contextlib.asynccontextmanager
async def dialled(rig: Any, preface: bytes = PREFACE) -> AsyncIterator[Caller]:
    connection = socket.socket()
    # Little room for what is not read, so that a test of it is short.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    address = ("127.0.0.1", rig.child.grpc_port)
    await asyncio.get_running_loop().sock_connect(connection, address)
    reader, writer = await asyncio.open_connection(sock=connection)
    writer.write(preface)
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()


def hello(rig: Any, role: Role = Role.AGENT, cluster: str = "steward") -> pb.LogHello:
    key = load_or_create_key(rig.child.data, CONTROL_KEY)
    token = RoleCredentials(key, role, cluster, "n9").token()
    return pb.LogHello(cluster=cluster, node_id="n9", role_token=token)


def append(number: int, payload: bytes = b"{}") -> pb.AppendEvents:
    user = placement_pb2.UserKey(tenant_id=ALICE.tenant, user_id=ALICE.user)
    events = [pb.StoredEvent(payload=payload, thread_id="main")]
    return pb.AppendEvents(
        request_id=number,
        user=user,
        epoch=1,
        append_number=number,
        expected_sequence=number,
        events=events,
    )


async def test_only_a_node_with_its_role_token_is_welcome(remote_rig: Any) -> None:
    for role in Role:
        async with dialled(remote_rig) as caller:
            caller.send(hello=hello(remote_rig, role))
            if role is Role.AGENT:
                assert (await caller.receive()).welcome.log_id
            else:
                assert await caller.refused() is Reason.PERMISSION_DENIED
    for token in ("", "x.y.z"):
        async with dialled(remote_rig) as caller:
            caller.send(hello=pb.LogHello(cluster="steward", node_id="n9", role_token=token))
            assert await caller.refused() is Reason.PERMISSION_DENIED
    async with dialled(remote_rig) as caller:
        caller.send(hello=hello(remote_rig, cluster="other"))
        assert await caller.refused() is Reason.PERMISSION_DENIED
    async with dialled(remote_rig) as caller:
        # A good token, and a node that believes to be elsewhere.
        stray = hello(remote_rig)
        stray.cluster = "other"
        caller.send(hello=stray)
        assert await caller.refused() is Reason.PERMISSION_DENIED


async def test_who_breaks_the_contract_is_told_why(remote_rig: Any) -> None:
    async with dialled(remote_rig) as caller:
        caller.send(batch=pb.LogBatch(appends=[append(1)]))
        assert await caller.refused() is Reason.PROTOCOL_VIOLATION
    async with dialled(remote_rig) as caller:
        caller.send(hello=hello(remote_rig))
        caller.send(hello=hello(remote_rig))
        assert await caller.refused() is Reason.PROTOCOL_VIOLATION
    async with dialled(remote_rig) as caller:
        caller.send(hello=hello(remote_rig))
        bad = append(1)
        bad.epoch = 0
        caller.send(batch=pb.LogBatch(appends=[bad]))
        assert await caller.refused() is Reason.PROTOCOL_VIOLATION
    async with dialled(remote_rig) as caller:
        caller.writer.write((3).to_bytes(LENGTH_BYTES, "big") + b"\xff\xff\xff")
        assert await caller.refused() is Reason.PROTOCOL_VIOLATION
    async with dialled(remote_rig) as caller:
        caller.writer.write((MAX_MESSAGE_BYTES + 1).to_bytes(LENGTH_BYTES, "big"))
        await caller.ended()
    assert isinstance(await remote_rig.log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)


async def test_who_speaks_neither_way_is_hung_up_on(remote_rig: Any) -> None:
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"steward-log/9\n", b"PRI * HTTP/9"):
        async with dialled(remote_rig, words) as caller:
            began = time.monotonic()
            assert await caller.ended() == b""
            assert time.monotonic() - began < FIRST_BYTES_S / 2, "at once, not when it is too late"


async def test_both_ways_go_through_one_port_at_once_and_preface_may_come_in_pieces(
    remote_rig: Any,
) -> None:
    assert isinstance(await remote_rig.log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)
    key = load_or_create_key(remote_rig.child.data, CONTROL_KEY)
    metadata = call_metadata(RoleCredentials(key, Role.AGENT, "steward", "n9"))
    async with (
        make_channel(remote_rig.child.address) as channel,
        dialled(remote_rig, PREFACE[:5]) as caller,
    ):
        stub = log_service_pb2_grpc.LogServiceStub(channel)
        described = await stub.DescribeLog(pb.DescribeLogRequest(), metadata=metadata)
        caller.writer.write(PREFACE[5:])
        caller.send(hello=hello(remote_rig))
        assert (await caller.receive()).welcome.log_id == described.log_id
        caller.send(ping=pb.LogPing(number=7))
        assert (await caller.receive()).pong.number == 7


async def test_appends_of_one_connection_are_answered_in_order_and_only_when_they_can_be_read(
    remote_rig: Any,
) -> None:
    assert isinstance(await remote_rig.log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)
    async with dialled(remote_rig) as caller:
        caller.send(hello=hello(remote_rig))
        await caller.receive()
        for number in range(1, 201):
            caller.send(batch=pb.LogBatch(appends=[append(number, b'{"n":%d}' % number)]))
        answered: list[int] = []
        while len(answered) < 200:
            for answer in (await caller.receive()).answers.appends:
                assert answer.committed.next_sequence == answer.request_id + 1
                answered.append(answer.request_id)
                if len(answered) == 1:
                    page = await remote_rig.log.read(ALICE, ReadRange(limit=1))
                    assert page.events == (b'{"n":1}',)
        assert answered == list(range(1, 201))


async def test_a_node_that_does_not_read_its_answers_is_not_read_for_ever(remote_rig: Any) -> None:
    """What it goes on sending stays with it: nothing grows at the log."""
    async with dialled(remote_rig) as caller:
        caller.send(hello=hello(remote_rig))
        await caller.receive()
        # Refused, since never sealed: the least work for the log, and an answer each.
        batch = pb.LogBatch(appends=[append(1)] * 512)
        stuck = False
        for _ in range(2_000):
            caller.send(batch=batch)
            try:
                await asyncio.wait_for(caller.writer.drain(), 2.0)
            except TimeoutError:
                stuck = True
                break
        assert stuck, "a million appends were taken from a node that reads nothing"
    event = (StoredEvent(b"1", "main"),)
    assert isinstance(await remote_rig.log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)
    first = Append(ALICE, Epoch(1), 1, Sequence(1), event, ())
    assert await remote_rig.log.append(first) == Committed(Sequence(2))
