"""Spans reach a real OTLP receiver with the ids that travelled, and never hold anybody up."""

import datetime
import ipaddress
import logging
import subprocess
import sys
import time
from collections.abc import ItemsView, Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.resources import Resource

from steward.config.settings import ServiceSettings
from steward.telemetry.otlp import make_tracing
from steward.telemetry.otlp_exporter import (
    CLOSE_TIMEOUT_S,
    END_TIMEOUT_S,
    MAX_QUEUED,
    MOST_PER_BATCH,
    SLICE,
    Batch,
    OtlpExporter,
)
from steward.telemetry.tracing import (
    Attribute,
    FinishedSpan,
    Kind,
    Link,
    Tracing,
    is_sampled,
    is_traceparent,
    new_traceparent,
)
from steward.testing.collector import SpanCollector, span_collector
from steward.testing.waiting import wait_for


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
    assert resource["service.version"] == version("steward")
    assert resource["telemetry.sdk.name"] == "opentelemetry"
    assert batch.scope_spans[0].scope.name == "steward"
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
    assert time.monotonic() - began < CLOSE_TIMEOUT_S + END_TIMEOUT_S + 1.0


def test_a_collector_that_is_away_delays_close_for_no_longer() -> None:
    tracing = make_tracing("edge", "edge-1", settings("127.0.0.1:1"))
    tracing.record("x", tracing.new_root(), time.time_ns(), {})
    began = time.monotonic()
    tracing.close()
    assert time.monotonic() - began < CLOSE_TIMEOUT_S + END_TIMEOUT_S + 1.0


def finished(name: str = "x", number: int = 0) -> FinishedSpan:
    return FinishedSpan(name, new_traceparent(sampled=True), "", 1, 2, {"number": number})


def spans_of(collector: SpanCollector) -> list[Span]:
    return [span for r in collector.received for scope in r.scope_spans for span in scope.spans]


def test_kinds_links_and_a_missing_parent_arrive(receiver: tuple[SpanCollector, str]) -> None:
    collector, endpoint = receiver
    other = new_traceparent(sampled=False)
    tracing = make_tracing("edge", "edge-1", settings(endpoint))
    for kind in Kind:
        tracing.record(
            kind.value,
            "",
            1,
            {},
            context=tracing.new_root(),
            kind=kind,
            links=(Link(other, {"steward.link": "attach"}),),
        )
    tracing.close()
    spans = {span.name: span for span in spans_of(collector)}
    assert {name: span.kind for name, span in spans.items()} == {
        "internal": Span.SPAN_KIND_INTERNAL,
        "server": Span.SPAN_KIND_SERVER,
        "producer": Span.SPAN_KIND_PRODUCER,
        "consumer": Span.SPAN_KIND_CONSUMER,
    }
    for span in spans.values():
        assert span.parent_span_id == b""
        (link,) = span.links
        assert (link.trace_id.hex(), link.span_id.hex()) == (other[3:35], other[36:52])
        assert [(pair.key, pair.value.string_value) for pair in link.attributes] == [
            ("steward.link", "attach")
        ]


def test_all_spans_of_several_batches_arrive_once_and_in_order(
    receiver: tuple[SpanCollector, str],
) -> None:
    collector, endpoint = receiver
    exporter = OtlpExporter("edge", "edge-1", "test", endpoint)
    numbers = range(3 * MOST_PER_BATCH + 7)
    for number in numbers:
        exporter.export(finished(number=number))
    exporter.close()
    arrived = [span.attributes[0].value.int_value for span in spans_of(collector)]
    assert arrived == list(numbers) and exporter.dropped == 0
    assert all(len(b.scope_spans[0].spans) <= MOST_PER_BATCH for b in collector.received)


@pytest.mark.parametrize("count, rests", [(1, 1), (SLICE, 1), (SLICE + 1, 2), (MOST_PER_BATCH, 8)])
def test_the_encoder_rests_after_each_slice(count: int, rests: int) -> None:
    encoded: list[int] = []
    rested: list[int] = []

    class Watched(dict[str, Attribute]):
        """Attributes that tell when they are encoded."""

        def items(self) -> ItemsView[str, Attribute]:
            encoded.append(1)
            return super().items()

    spans = [finished()._replace(attributes=Watched(a=1))] * count
    batch = Batch(spans, Resource({}), lambda: rested.append(len(encoded)))
    request = encode_spans(batch)
    assert len(batch) == count == len(request.resource_spans[0].scope_spans[0].spans)
    assert len(rested) == rests and rested[-1] == count
    assert all(b - a <= SLICE for a, b in pairwise([0, *rested]))


def test_what_finds_no_room_is_the_oldest_and_is_counted_and_told(
    receiver: tuple[SpanCollector, str], caplog: pytest.LogCaptureFixture
) -> None:
    collector, endpoint = receiver
    collector.gate.clear()
    exporter = OtlpExporter("edge", "edge-1", "test", endpoint)
    exporter.export(finished("first"))
    # From here on its thread waits for the collector, and takes nothing more.
    wait_for(lambda: not exporter.waiting, 5, "the first batch to be on its way")
    for number in range(MAX_QUEUED + 10):
        exporter.export(finished(number=number))
    assert exporter.waiting == MAX_QUEUED and exporter.dropped == 10
    with caplog.at_level(logging.WARNING):
        collector.gate.set()
        exporter.close()
    spans = spans_of(collector)
    assert spans[0].name == "first" and spans[1].attributes[0].value.int_value == 10
    assert len(spans) + exporter.dropped == MAX_QUEUED + 11
    assert "spans were dropped" in caplog.messages


def test_spans_that_nobody_took_until_the_deadline_are_counted(
    receiver: tuple[SpanCollector, str],
) -> None:
    collector, endpoint = receiver
    collector.gate.clear()
    exporter = OtlpExporter("edge", "edge-1", "test", endpoint)
    for _ in range(300):
        exporter.export(finished())
    exporter.close()
    assert exporter.dropped == 300 and exporter.waiting == 0


def test_a_batch_that_cannot_be_encoded_does_not_stop_those_behind_it(
    receiver: tuple[SpanCollector, str],
) -> None:
    collector, endpoint = receiver
    exporter = OtlpExporter("edge", "edge-1", "test", endpoint)
    exporter.export(finished()._replace(context="no traceparent"))
    wait_for(lambda: exporter.dropped == 1, 5, "the batch to be dropped")
    exporter.export(finished("behind"))
    exporter.close()
    assert [span.name for span in spans_of(collector)] == ["behind"]


def test_headers_and_resource_attributes_of_the_environment_are_sent(
    receiver: tuple[SpanCollector, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    collector, endpoint = receiver
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=blue")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test,service.name=mine")
    tracing = make_tracing("edge", "edge-1", settings(endpoint))
    record_one(tracing)
    tracing.close()
    assert [headers["x-tenant"] for headers in collector.headers] == ["blue"]
    [batch] = collector.received
    resource = {pair.key: pair.value.string_value for pair in batch.resource.attributes}
    assert resource["deployment.environment"] == "test"
    assert resource["service.name"] == "steward-edge"


def test_a_collector_with_tls_is_reached_with_the_certificate_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = self_signed()
    (tmp_path / "ca.crt").write_bytes(certificate)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(tmp_path / "ca.crt"))
    with span_collector(grpc.ssl_server_credentials([(key, certificate)])) as (collector, endpoint):
        tracing = make_tracing("edge", "edge-1", settings(f"https://{endpoint}"))
        record_one(tracing)
        tracing.close()
    assert [span.name for span in collector.spans()] == ["x"]


def record_one(tracing: Tracing) -> None:
    tracing.record("x", "", 1, {}, context=tracing.new_root())


def self_signed() -> tuple[bytes, bytes]:
    """A certificate for 127.0.0.1 and its key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "collector")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return certificate.public_bytes(serialization.Encoding.PEM), secret
