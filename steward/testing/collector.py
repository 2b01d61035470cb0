"""A real OTLP receiver in this process, for tests that ask what was traced."""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Status


@dataclass(frozen=True, slots=True)
class SeenSpan:
    """One span. Ids are lower-case hex; `service` is the resource's `service.name`.

    `links` are (trace id, span id, attributes) of the spans that it is joined with.
    """

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any] = field(default_factory=dict, hash=False)
    links: tuple[tuple[str, str, dict[str, Any]], ...] = field(default=(), hash=False)
    failed: bool = False


class SpanCollector(TraceServiceServicer):
    """Remembers what it was sent. With `gate` cleared it answers nobody.

    `headers` are those of each request, by name.
    """

    def __init__(self) -> None:
        self.received: list[ResourceSpans] = []
        self.headers: list[dict[str, str | bytes]] = []
        self.gate = threading.Event()
        self.gate.set()

    def Export(
        self, request: otlp.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> otlp.ExportTraceServiceResponse:
        self.gate.wait(10)
        self.headers.append({name: value for name, value in context.invocation_metadata()})
        self.received.extend(request.resource_spans)
        return otlp.ExportTraceServiceResponse()

    def spans(self) -> list[SeenSpan]:
        """Every span so far, in the order of arrival."""
        found: list[SeenSpan] = []
        for resource in list(self.received):
            attributes = _values(resource.resource.attributes)
            for scope in resource.scope_spans:
                found.extend(
                    SeenSpan(
                        attributes.get("service.name", ""),
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        _values(span.attributes),
                        tuple(
                            (link.trace_id.hex(), link.span_id.hex(), _values(link.attributes))
                            for link in span.links
                        ),
                        span.status.code == Status.STATUS_CODE_ERROR,
                    )
                    for span in scope.spans
                )
        return found


@contextmanager
def span_collector(
    credentials: grpc.ServerCredentials | None = None,
) -> Iterator[tuple[SpanCollector, str]]:
    """A running collector and its `host:port`; with `credentials` it speaks TLS."""
    collector = SpanCollector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    anywhere = "127.0.0.1:0"
    if credentials is None:
        port = server.add_insecure_port(anywhere)
    else:
        port = server.add_secure_port(anywhere, credentials)
    server.start()
    try:
        yield collector, f"127.0.0.1:{port}"
    finally:
        collector.gate.set()
        server.stop(None).wait()


def _values(attributes: Iterable[KeyValue]) -> dict[str, Any]:
    """Attributes as plain values."""
    found: dict[str, Any] = {}
    for attribute in attributes:
        kind = attribute.value.WhichOneof("value")
        found[attribute.key] = getattr(attribute.value, kind) if kind else None
    return found
