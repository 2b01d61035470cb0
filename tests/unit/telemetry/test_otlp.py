"""Spans reach a real OTLP receiver with the ids that travelled, and never hold anybody up."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from steward.config.settings import ServiceSettings
from steward.telemetry.otlp import make_tracing
from steward.telemetry.otlp_exporter import CLOSE_TIMEOUT_S
from steward.telemetry.tracing import is_sampled, is_traceparent
from steward.testing.collector import SpanCollector, span_collector


@pytest.fixture
def receiver() -> Iterator[tuple[SpanCollector, str]]:
    with span_collector() as running:
        yield running


def settings(endpoint: str, ratio: float = 1.0) -> ServiceSettings:
    return ServiceSettings(otlp_endpoint=endpoint, trace_ratio=ratio, cluster="test")


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_a_span_arrives_with_the_ids_parent_times_and_attributes_given(
    receiver: tuple[SpanCollector, str], scheme: str
) -> None:
    collector, endpoint = receiver
    tracing = make_tracing("edge", "edge-1", settings(scheme + endpoint))
    root = tracing.new_root()
    assert is_traceparent(root) and is_sampled(root)
    start = time.time_ns()
    child = tracing.record("edge.connect", root, start, {"steward.kind": "ws", "n": 3})
    grandchild = tracing.record("agent.run", child, start, {}, failed=True)
    tracing.close()
    tracing.close()
    [batch] = collector.received
    resource = {pair.key: pair.value.string_value for pair in batch.resource.attributes}
    assert resource["service.name"] == "steward-edge"
    assert resource["service.instance.id"] == "edge-1"
    assert resource["service.namespace"] == "test"
    first, second = batch.scope_spans[0].spans
    assert first.name == "edge.connect"
    assert first.trace_id.hex() == second.trace_id.hex() == root[3:35]
    assert first.parent_span_id.hex() == root[36:52]
    assert first.span_id.hex() == child[36:52]
    assert second.parent_span_id.hex() == child[36:52]
    assert second.span_id.hex() == grandchild[36:52]
    assert first.start_time_unix_nano == start <= first.end_time_unix_nano
    values = {pair.key: pair.value for pair in first.attributes}
    assert (values["steward.kind"].string_value, values["n"].int_value) == ("ws", 3)
    assert second.status.code == Status.STATUS_CODE_ERROR
    assert first.status.code == Status.STATUS_CODE_UNSET


def test_a_span_of_a_trace_that_is_not_sampled_is_not_sent(
    receiver: tuple[SpanCollector, str],
) -> None:
    collector, endpoint = receiver
    tracing = make_tracing("edge", "edge-1", settings(endpoint, ratio=0.0))
    root = tracing.new_root()
    assert tracing.record("x", root, time.time_ns(), {}) == root
    # A trace that another process has sampled is kept, whatever the own ratio is.
    tracing.record("y", root[:-2] + "01", time.time_ns(), {})
    tracing.close()
    names = [s.name for b in collector.received for c in b.scope_spans for s in c.spans]
    assert names == ["y"]


def test_without_an_endpoint_nothing_is_sampled_and_no_sdk_is_imported() -> None:
    program = (
        "import sys; from steward.config.settings import ServiceSettings;"
        "from steward.telemetry.otlp import make_tracing;"
        "t = make_tracing('edge', 'e', ServiceSettings());"
        "assert t.new_root().endswith('-00');"
        "t.close();"
        "print(sorted(m for m in sys.modules if m.startswith('opentelemetry')))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert out.stdout.decode().strip() == "[]"


def test_a_collector_that_does_not_answer_delays_neither_record_nor_close_for_long(
    receiver: tuple[SpanCollector, str],
) -> None:
    collector, endpoint = receiver
    collector.gate.clear()
    tracing = make_tracing("edge", "edge-1", settings(endpoint))
    root = tracing.new_root()
    began = time.monotonic()
    for _ in range(2000):
        tracing.record("x", root, time.time_ns(), {"a": 1})
    assert time.monotonic() - began < 2.0
    began = time.monotonic()
    tracing.close()
    assert time.monotonic() - began < CLOSE_TIMEOUT_S + 2.0


def test_a_collector_that_is_away_delays_close_for_no_longer() -> None:
    tracing = make_tracing("edge", "edge-1", settings("127.0.0.1:1"))
    tracing.record("x", tracing.new_root(), time.time_ns(), {})
    began = time.monotonic()
    tracing.close()
    assert time.monotonic() - began < CLOSE_TIMEOUT_S + 2.0
