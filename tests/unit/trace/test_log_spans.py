"""What a log records: each traced event until it is durable, and each traced seal."""

from collections.abc import Sequence

import pytest

from agent_service.core.journal import Append, Committed, Conflict, Fenced, Seal, StoredEvent
from agent_service.log.memory import LogState
from agent_service.log.port import LogFailed, Outcome
from agent_service.log.spans import UNTRACED, watched
from steward.model.keys import Epoch, StreamId, UserKey
from steward.model.keys import Sequence as At
from steward.telemetry import conventions as names
from steward.telemetry.tracing import Kind, Tracing
from steward.testing.spans import KeptSpans

ALICE = UserKey("default", "alice")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
FIRST, SECOND = (f"00-{TRACE}-00f067aa0ba902b{n}-01" for n in (7, 8))
EPOCH = Epoch(7)


class Told:
    """Who submitted operations, and what was recorded when it was told."""

    def __init__(self, kept: KeptSpans) -> None:
        self._kept = kept
        self.outcomes: list[Sequence[Outcome] | LogFailed] = []
        self.recorded = -1

    def __call__(self, outcomes: Sequence[Outcome] | LogFailed) -> None:
        self.outcomes.append(outcomes)
        self.recorded = len(self._kept.spans)


def append(*traces: tuple[int, str]) -> Append:
    events = (StoredEvent(b"{}", "main"), StoredEvent(b"{}", "main"))
    return Append(ALICE, EPOCH, 1, At(1), events, (), traces)


def seal(traceparent: str = "") -> Seal:
    return Seal(ALICE, EPOCH, "activation", traceparent)


def test_each_traced_event_of_an_append_is_a_span_before_its_outcome_is_told() -> None:
    kept = KeptSpans()
    told = Told(kept)
    log = LogState(lambda: StreamId("s"))
    sealed = log.seal(seal())
    write = append((1, FIRST), (2, SECOND))
    done = watched(Tracing(kept), [write], told)
    outcomes = [log.append(write)]
    assert kept.spans == []
    done(outcomes)
    assert sealed and told.outcomes == [outcomes] and told.recorded == 2
    assert [(s.name, s.parent, s.failed, s.kind) for s in kept.spans] == [
        (names.LOG_COMMIT, FIRST, False, Kind.SERVER),
        (names.LOG_COMMIT, SECOND, False, Kind.SERVER),
    ]
    assert [s.attributes for s in kept.spans] == [
        {names.SEQUENCE: 1, names.EPOCH: 7},
        {names.SEQUENCE: 2, names.EPOCH: 7},
    ]
    assert all(0 < s.start_ns <= s.end_ns for s in kept.spans)


def test_a_traced_seal_is_a_span_and_one_that_nobody_traces_is_none() -> None:
    kept = KeptSpans()
    log = LogState(lambda: StreamId("s"))
    operations = [seal(FIRST), Seal(UserKey("default", "bob"), EPOCH, "other")]
    watched(Tracing(kept), operations, Told(kept))([log.seal(one) for one in operations])
    (span,) = kept.spans
    assert (span.name, span.parent, span.failed) == (names.LOG_SEAL, FIRST, False)
    assert span.attributes == {names.EPOCH: 7}


@pytest.mark.parametrize("refused", [Fenced(Epoch(8)), Conflict(At(3))])
def test_what_the_log_refuses_failed(refused: Fenced | Conflict) -> None:
    kept = KeptSpans()
    operations = [append((1, FIRST)), append((1, SECOND))]
    watched(Tracing(kept), operations, Told(kept))([refused, Committed(At(3))])
    assert [(span.parent, span.failed) for span in kept.spans] == [(FIRST, True), (SECOND, False)]


def test_a_log_that_failed_tells_so_and_records_nothing() -> None:
    kept = KeptSpans()
    told = Told(kept)
    failure = LogFailed("disk full")
    watched(Tracing(kept), [append((1, FIRST))], told)(failure)
    assert told.outcomes == [failure] and kept.spans == []


def test_without_a_trace_nothing_stands_between_the_log_and_who_waits() -> None:
    kept = KeptSpans()
    told = Told(kept)
    assert watched(Tracing(kept), [append(), seal()], told) is told
    assert watched(UNTRACED, [append((1, FIRST)), seal(FIRST)], told) is told
