"""A real OTLP receiver in this process, for tests that ask what was traced."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans


@dataclass(frozen=True, slots=True)
class SeenSpan:
    """One span. Ids are lower-case hex; `service` is the resource's `service.name`."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str


class SpanCollector(TraceServiceServicer):
    """Remembers what it was sent. With `gate` cleared it answers nobody."""

    def __init__(self) -> None:
        self.received: list[ResourceSpans] = []
        self.gate = threading.Event()
        self.gate.set()

    def Export(
        self, request: otlp.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> otlp.ExportTraceServiceResponse:
        self.gate.wait(10)
        self.received.extend(request.resource_spans)
        return otlp.ExportTraceServiceResponse()

    def spans(self) -> list[SeenSpan]:
        """Every span so far, in the order of arrival."""
        found: list[SeenSpan] = []
        for resource in list(self.received):
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                found.extend(
                    SeenSpan(
                        attributes.get("service.name", ""),
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                    )
                    for span in scope.spans
                )
        return found


@contextmanager
def span_collector() -> Iterator[tuple[SpanCollector, str]]:
    """A running collector and its `host:port`."""
    collector = SpanCollector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"127.0.0.1:{port}"
    finally:
        collector.gate.set()
        server.stop(None).wait()
