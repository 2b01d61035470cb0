"""What an edge records: each delivery that was announced, until the client has acknowledged it."""

from collections import OrderedDict
from dataclasses import dataclass

from edge.core.commands import Accepted, CancelRun, Refused
from edge.core.resume import Resume
from edge.host.spans import MOST_ANNOUNCED, MOST_UNACKNOWLEDGED, Arrival, EdgeSpans
from steward.errors import Reason
from steward.telemetry import conventions as names
from steward.telemetry.tracing import Tracing, is_sampled, is_traceparent
from steward.testing.spans import KeptSpans

SAMPLED = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
UNSAMPLED = SAMPLED[:-2] + "00"


@dataclass(frozen=True, eq=False)
class OneSession:
    next: int
    resume: Resume | None = Resume.NEW
    connection_id: str = "c-1"


@dataclass(frozen=True, eq=False)
class OneConnection:
    session: OneSession


def edge(ratio: float) -> tuple[EdgeSpans, KeptSpans]:
    kept = KeptSpans()
    return EdgeSpans(Tracing(kept, ratio)), kept


def test_an_announced_event_is_a_span_for_each_connection_that_has_it() -> None:
    spans, kept = edge(0.0)
    here, there, behind = (OneConnection(OneSession(at)) for at in (6, 6, 5))
    traces = spans.announced(None, 5, SAMPLED)
    assert traces == {5: SAMPLED}
    assert spans.delivered(traces, (here, there, behind), 5, 6, 7, 1) is None
    assert kept.names() == ["edge.deliver"] * 2
    assert {span.parent for span in kept.spans} == {SAMPLED}
    assert kept.spans[0].attributes == {
        names.SEQUENCE: 5,
        names.EPOCH: 7,
        names.CONNECTION_ID: "c-1",
    }
    spans.acknowledged(behind, 5)
    spans.acknowledged(here, 4)
    assert len(kept.spans) == 2
    spans.acknowledged(here, 5)
    spans.acknowledged(here, 5)
    assert kept.names()[2:] == ["edge.acknowledge"]
    assert kept.spans[2].parent == kept.spans[0].context


def test_what_is_announced_waits_for_its_delivery_and_is_dropped_when_that_is_past() -> None:
    spans, kept = edge(0.0)
    connection = OneConnection(OneSession(20))
    traces = None
    for sequence in (3, 7, 12):
        traces = spans.announced(traces, sequence, SAMPLED)
    assert traces is not None
    assert spans.delivered(traces, (connection,), 5, 10, 1, 1) == {12: SAMPLED}
    assert [span.attributes[names.SEQUENCE] for span in kept.spans] == [7]


def test_what_is_kept_open_is_bounded() -> None:
    spans, kept = edge(0.0)
    traces: OrderedDict[int, str] | None = None
    most = MOST_ANNOUNCED + 10
    for sequence in range(most):
        traces = spans.announced(traces, sequence, SAMPLED)
    assert traces is not None and len(traces) == MOST_ANNOUNCED
    connection = OneConnection(OneSession(most))
    spans.delivered(traces, (connection,), 0, most, 1, 1)
    kept.spans.clear()
    spans.acknowledged(connection, most)
    assert len(kept.spans) == MOST_UNACKNOWLEDGED


def test_a_connection_that_is_gone_is_forgotten() -> None:
    spans, kept = edge(0.0)
    connection = OneConnection(OneSession(6))
    traces = spans.announced(None, 5, SAMPLED)
    assert traces is not None
    spans.delivered(traces, (connection,), 5, 6, 1, 1)
    spans.leaving(connection, 1000)
    spans.acknowledged(connection, 5)
    assert kept.names() == ["edge.deliver"]


def test_nothing_is_announced_that_is_no_sampled_trace_or_where_traces_are_off() -> None:
    spans, _ = edge(1.0)
    for text in (UNSAMPLED, "", "x" * 55):
        assert spans.announced(None, 5, text) is None
    assert EdgeSpans(Tracing()).announced(None, 5, SAMPLED) is None


def test_a_connection_ends_its_span_when_events_flow_and_messages_are_linked_with_it() -> None:
    spans, kept = edge(1.0)
    connection = OneConnection(OneSession(1))
    arrival = Arrival()
    context = spans.arrive(arrival)
    assert spans.joined(connection, arrival) == context
    spans.attached(connection, connection.session, 7)
    spans.leaving(object(), 1000)
    (connect,) = kept.spans
    assert (connect.name, connect.context, connect.parent) == ("edge.connect", context, "")
    trace, answered = spans.receive(connection, Arrival.of(SAMPLED), CancelRun("r1"))
    assert answered is not None and trace[3:35] == SAMPLED[3:35]
    answered(Accepted("m", "r1", 1, False, 0))
    receive = kept.spans[1]
    assert (receive.name, receive.parent, receive.failed) == ("edge.receive", SAMPLED, False)
    assert [link.context for link in receive.links] == [context]


def test_a_command_that_fails_by_the_cluster_is_recorded_and_one_of_the_client_is_not() -> None:
    spans, kept = edge(0.0)
    for reason in (Reason.RATE_LIMITED, Reason.MANAGER_UNAVAILABLE):
        _, answered = spans.receive(object(), Arrival(), CancelRun("r1"))
        assert answered is not None
        answered(Refused(reason, "no"))
    (span,) = kept.spans
    assert span.failed and span.attributes[names.REASON] == "MANAGER_UNAVAILABLE"
    assert span.attributes[names.UPGRADED] is True


def test_a_connection_that_never_got_an_event_by_a_fault_of_the_cluster_is_recorded() -> None:
    spans, kept = edge(0.0)
    for code in (1000, 4006):
        connection = OneConnection(OneSession(1, None))
        spans.joined(connection, Arrival())
        spans.leaving(connection, code)
    (span,) = kept.spans
    assert span.failed and span.attributes[names.CLOSE_CODE] == 4006


def test_a_resumed_connection_is_joined_with_what_it_missed_once() -> None:
    spans, kept = edge(0.0)
    connection = OneConnection(OneSession(3, Resume.RESUMED))
    spans.joined(connection, Arrival())
    spans.attached(connection, connection.session, 7)
    missed = [b'{"type":"x","trace":"%b","data":{}}' % t.encode() for t in (UNSAMPLED, SAMPLED)]
    spans.replayed(connection, missed)
    spans.replayed(connection, missed)
    (span,) = kept.spans
    assert span.name == "edge.resume" and [link.context for link in span.links] == [SAMPLED]


def test_the_search_after_a_failover_is_always_recorded_and_another_with_what_is_sampled() -> None:
    spans, kept = edge(0.0)
    assert spans.again((), names.REATTACH) == "" and kept.spans == []
    assert is_sampled(spans.again((), names.FAILOVER))
    connection = OneConnection(OneSession(1))
    spans.joined(connection, Arrival.of(SAMPLED))
    assert is_sampled(spans.again((connection,), names.HANDOFF))
    assert [link.context[3:35] for link in kept.spans[1].links] == [SAMPLED[3:35]]


def test_without_traces_every_message_still_has_a_context() -> None:
    spans = EdgeSpans(Tracing())
    trace, answered = spans.receive(object(), Arrival(), CancelRun("r1"))
    assert is_traceparent(trace) and not is_sampled(trace) and answered is None
    assert spans.receive(object(), Arrival.of(SAMPLED), CancelRun("r1"))[0] == SAMPLED
