"""A framed connection at the log's end, with an engine that answers when it is told to."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent_service.core.journal import Committed
from agent_service.log.framed import FramedNodes
from agent_service.log.intake import MOST_IN_FLIGHT
from agent_service.log.sqlite import SqliteLog
from steward.model.keys import Sequence as SequenceNumber
from steward.rpc.frame_guard import MOST_HELLO_BYTES
from steward.rpc.frames import LENGTH_BYTES
from steward.rpc.roles import Role, RoleCredentials, RoleVerifier
from steward.v1 import log_service_pb2 as pb
from steward.v1 import placement_pb2

pytestmark = pytest.mark.asyncio
USER = placement_pb2.UserKey(tenant_id="default", user_id="alice")
HALF = MOST_IN_FLIGHT // 2


class Engine:
    """Takes operations and answers them when `answer` is called."""

    log_id = "log"

    def __init__(self) -> None:
        self.waiting: list[tuple[int, Callable[[Any], None]]] = []

    def submit(self, operations: Sequence[Any], size: int, done: Callable[[Any], None]) -> None:
        self.waiting.append((len(operations), done))

    async def answer(self) -> None:
        """Commit what waits, and let the loop do what follows."""
        waiting, self.waiting = self.waiting, []
        for number, done in waiting:
            done([Committed(SequenceNumber(2))] * number)
        await asyncio.sleep(0)


class Wire(asyncio.Transport):
    """A node's end that keeps what it is sent, and can be slow."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.reading = True
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def taken(self) -> list[pb.HoldLogStreamResponse]:
        """The messages that came since the last call."""
        data, self.written = self.written, b""
        messages: list[pb.HoldLogStreamResponse] = []
        while data:
            end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "big")
            messages.append(pb.HoldLogStreamResponse.FromString(data[LENGTH_BYTES:end]))
            data = data[end:]
        return messages


class Node:
    """A connection that has said hello."""

    def __init__(self) -> None:
        key = Ed25519PrivateKey.generate()
        self.engine = Engine()
        nodes = FramedNodes(
            cast(SqliteLog, self.engine), "c", RoleVerifier(key, "c"), lambda _: None
        )
        self.connection = nodes.accept()
        self.wire = Wire()
        self.connection.connection_made(self.wire)
        token = RoleCredentials(key, Role.AGENT, "c", "n").token()
        self.say(hello=pb.LogHello(cluster="c", node_id="n", role_token=token))
        assert self.wire.taken()[0].HasField("welcome")

    def say(self, **body: Any) -> None:
        frame = pb.HoldLogStreamRequest(**body).SerializeToString()
        self.connection.data_received(len(frame).to_bytes(LENGTH_BYTES, "big") + frame)

    def append(self, first: int, number: int) -> None:
        appends = [
            pb.AppendEvents(
                request_id=request, user=USER, epoch=1, append_number=1, expected_sequence=1
            )
            for request in range(first, first + number)
        ]
        self.say(batch=pb.LogBatch(appends=appends))

    def answered(self) -> list[int]:
        return [
            answer.request_id for message in self.wire.taken() for answer in message.answers.appends
        ]

    def close(self) -> None:
        self.connection.connection_lost(None)


async def test_a_node_with_too_much_unanswered_is_not_read_until_there_is_room() -> None:
    node = Node()
    node.append(1, HALF)
    node.append(1 + HALF, HALF)
    assert node.wire.reading
    node.append(1 + 2 * HALF, 1)
    assert not node.wire.reading
    node.append(2 + 2 * HALF, 1)
    assert sum(number for number, _ in node.engine.waiting) == MOST_IN_FLIGHT
    await node.engine.answer()
    assert node.answered() == list(range(1, 1 + 2 * HALF))
    assert node.wire.reading
    await node.engine.answer()
    assert node.answered() == [1 + 2 * HALF, 2 + 2 * HALF], "what was read before goes first"
    node.close()


async def test_answers_that_a_node_does_not_read_count_as_unanswered() -> None:
    node = Node()
    node.connection.pause_writing()
    node.append(1, MOST_IN_FLIGHT)
    await node.engine.answer()
    node.say(ping=pb.LogPing(number=1))
    node.say(ping=pb.LogPing(number=2))
    assert node.wire.taken() == [], "nothing grows at this end"
    node.append(1 + MOST_IN_FLIGHT, 1)
    assert not node.wire.reading
    assert not node.engine.waiting
    node.connection.resume_writing()
    first, *rest = node.wire.taken()
    assert first.pong.number == 2
    assert sum(len(message.answers.appends) for message in rest) == MOST_IN_FLIGHT
    assert node.wire.reading
    assert len(node.engine.waiting) == 1
    node.close()


async def test_answers_of_one_group_travel_as_one_message() -> None:
    node = Node()
    node.append(1, 1)
    node.append(2, 1)
    await node.engine.answer()
    messages = node.wire.taken()
    assert [[a.request_id for a in message.answers.appends] for message in messages] == [[1, 2]]
    node.close()


async def test_nothing_is_submitted_for_a_node_that_is_gone() -> None:
    node = Node()
    node.append(1, MOST_IN_FLIGHT)
    node.append(1 + MOST_IN_FLIGHT, 1)
    node.close()
    await node.engine.answer()
    assert not node.engine.waiting


async def test_only_who_is_known_may_send_a_long_message() -> None:
    nodes = FramedNodes(
        cast(SqliteLog, Engine()), "c", RoleVerifier(Ed25519PrivateKey.generate(), "c"), print
    )
    stranger, wire = nodes.accept(), Wire()
    stranger.connection_made(wire)
    stranger.data_received((MOST_HELLO_BYTES + 1).to_bytes(LENGTH_BYTES, "big"))
    assert wire.closed
    stranger.connection_lost(None)
    node = Node()
    node.connection.data_received((MOST_HELLO_BYTES + 1).to_bytes(LENGTH_BYTES, "big"))
    assert not node.wire.closed
    node.close()
