"""Answers of the log at a node: who is told, and what that leads to on the wire."""

from collections.abc import Sequence
from typing import Any

import pytest

from agent_service.core.journal import Append, Committed, StoredEvent
from agent_service.log.port import LogFailed, Outcome
from agent_service.log.stream import LogStream
from steward.model.keys import Epoch, NodeId, UserKey
from steward.model.keys import Sequence as SequenceNumber
from steward.v1 import log_service_pb2 as pb

pytestmark = pytest.mark.asyncio


class Wire:
    """Takes what a stream sends, and answers it."""

    def __init__(self) -> None:
        self.stream = LogStream("127.0.0.1:1", "test", NodeId("n"), None)  # type: ignore[arg-type]
        self.sent: list[pb.HoldLogStreamRequest] = []
        self.stream._link = self  # type: ignore[assignment]

    def send(self, message: bytes) -> None:
        self.sent.append(pb.HoldLogStreamRequest.FromString(message))

    def answer(self) -> None:
        """All that was sent and not answered is committed, by one message."""
        response = pb.HoldLogStreamResponse()
        for request in self.sent:
            for append in request.batch.appends:
                answer = response.answers.appends.add(request_id=append.request_id)
                answer.committed.next_sequence = append.expected_sequence + 1
        self.sent.clear()
        self.stream._on_message(response)


def append_of(name: str, number: int) -> Append:
    event = StoredEvent(b"x", "main")
    user = UserKey("default", name)
    return Append(user, Epoch(1), number, SequenceNumber(number), (event,), ())


async def test_whoever_fails_on_an_answer_keeps_no_other_from_its_own() -> None:
    wire = Wire()
    told: list[Any] = []

    def fail(_: Sequence[Outcome] | LogFailed) -> None:
        raise RuntimeError("a mistake of a listener")

    wire.stream.submit([append_of("ann", 1)], fail)
    wire.stream.submit([append_of("ben", 1)], told.append)
    wire.answer()
    assert told == [[Committed(SequenceNumber(2))]]


async def test_what_the_answers_of_one_message_lead_to_goes_out_in_one_message() -> None:
    wire = Wire()
    for name in ("ann", "ben"):
        following = [append_of(name, 2)]

        def go_on(
            _: Sequence[Outcome] | LogFailed, following: Sequence[Append] = following
        ) -> None:
            wire.stream.submit(following, lambda _: None)

        wire.stream.submit([append_of(name, 1)], go_on)
    assert len(wire.sent) == 2, "each was sent when it was submitted"
    wire.answer()
    (message,) = wire.sent
    assert [append.user.user_id for append in message.batch.appends] == ["ann", "ben"]


async def test_a_group_is_told_when_the_last_of_it_is_answered_and_in_its_order() -> None:
    wire = Wire()
    told: list[Any] = []
    wire.stream.submit([append_of("ann", 1), append_of("ben", 5)], told.append)
    second = wire.sent[0].batch.appends.pop()
    wire.answer()
    assert told == []
    wire.sent.append(pb.HoldLogStreamRequest(batch=pb.LogBatch(appends=[second])))
    wire.answer()
    assert told == [[Committed(SequenceNumber(2)), Committed(SequenceNumber(6))]]
