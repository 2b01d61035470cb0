"""Values and messages: a round trip over bytes changes nothing."""

from typing import cast

import pytest

from agent_service.core.journal import (
    Append,
    AppendOutcome,
    Committed,
    Conflict,
    Fenced,
    Record,
    RecordKind,
    Seal,
    Sealed,
    SealOutcome,
    StoredEvent,
)
from agent_service.log import convert
from agent_service.log.port import EventPage, ReadRange, ThreadSummary
from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, Sequence, StreamId, UserKey
from steward.v1 import agent_service_pb2, log_service_pb2

USER = UserKey("t/é", "u\x00\U0001f600")
RECORDS = tuple(Record(kind, f"k{kind}", b'{"sequence": 1}') for kind in RecordKind)


def test_append_survives_the_wire() -> None:
    append = Append(
        USER,
        Epoch((1 << 53) - 1),
        7,
        Sequence(9),
        (StoredEvent(b"\x00\xff", "main", True), StoredEvent(b"", "")),
        (*RECORDS, Record(RecordKind.RUN, "gone", deleted=True)),
    )
    message = log_service_pb2.AppendEvents()
    convert.fill_append(message, 5, append)
    message = log_service_pb2.AppendEvents.FromString(message.SerializeToString())
    assert message.request_id == 5
    assert convert.append_from(message) == (append, 2 + len(RECORDS) * len(b'{"sequence": 1}'))


def test_seal_survives_the_wire() -> None:
    seal = Seal(USER, Epoch(3), "activation")
    message = log_service_pb2.SealStream()
    convert.fill_seal(message, 5, seal)
    message = log_service_pb2.SealStream.FromString(message.SerializeToString())
    assert (message.request_id, convert.seal_from(message)) == (5, seal)


@pytest.mark.parametrize(
    "outcome",
    [
        Sealed(StreamId("s"), Sequence(4), Sequence(2), RECORDS, 3),
        Sealed(StreamId("s"), Sequence(1), Sequence(1), ()),
        Fenced(Epoch(9)),
    ],
)
def test_seal_outcome_survives_the_wire(outcome: SealOutcome) -> None:
    message = log_service_pb2.SealAnswer()
    convert.fill_seal_answer(message, 5, outcome)
    message = log_service_pb2.SealAnswer.FromString(message.SerializeToString())
    assert convert.seal_outcome_from(message) == outcome


@pytest.mark.parametrize(
    "outcome", [Committed(Sequence(4)), Fenced(Epoch(0)), Fenced(Epoch(9)), Conflict(Sequence(1))]
)
def test_append_outcome_survives_the_wire(outcome: AppendOutcome) -> None:
    message = log_service_pb2.AppendAnswer()
    convert.fill_append_answer(message, 5, outcome)
    message = log_service_pb2.AppendAnswer.FromString(message.SerializeToString())
    assert convert.append_outcome_from(message) == outcome


def test_answer_without_a_result_is_no_outcome() -> None:
    for read, message in (
        (convert.append_outcome_from, log_service_pb2.AppendAnswer(request_id=1)),
        (convert.seal_outcome_from, log_service_pb2.SealAnswer(request_id=1)),
    ):
        with pytest.raises(StewardError) as refused:
            read(cast("log_service_pb2.AppendAnswer", message))
        assert refused.value.reason is Reason.PROTOCOL_VIOLATION


def test_reads_survive_the_wire() -> None:
    wanted = ReadRange(3, 9, 7, 1000, "side", True, True)
    request = convert.range_to(USER, wanted)
    assert (convert.user_from(request.user), convert.range_from(request)) == (USER, wanted)
    assert convert.range_from(agent_service_pb2.ReadEventsRequest()) == ReadRange()
    page = EventPage(StreamId("s"), (b"a", b""), (3, 4), 9, 2, True)
    assert convert.page_from(convert.page_to(page)) == page
    listed = ([ThreadSummary("é", "title", 4, "time")], "next")
    assert convert.threads_from(convert.threads_to(*listed)) == listed
