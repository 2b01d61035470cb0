"""Sampled spans to an OpenTelemetry collector, over OTLP on gRPC.

Ids are those that travel in the `traceparent`, never made here, so that the spans of all
services join into one trace. Only `steward.telemetry.otlp` imports this module, and only
when an endpoint is set: OpenTelemetry's SDK costs a quarter of a second at start.

Guaranteed: recording never waits for the collector. Not guaranteed: delivery. At most
`MAX_QUEUED` spans wait; when the collector is away or slow, the oldest are dropped.
"""

import threading
from collections.abc import Mapping
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from steward.telemetry.tracing import Attribute

MAX_QUEUED = 8192
"""Spans that may wait for the collector."""

SEND_EVERY_MS = 500
EXPORT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("steward")
_OK = Status(StatusCode.UNSET)
_FAILED = Status(StatusCode.ERROR)


class OtlpExporter:
    """A `steward.telemetry.tracing.SpanExporter` over a background thread."""

    def __init__(self, service: str, instance: str, cluster: str, endpoint: str) -> None:
        """`endpoint`: `host:port` or `http://host:port` in clear text, `https://…` with TLS."""
        url = urlsplit(endpoint)
        self._resource = Resource(
            {
                "service.name": f"steward-{service}",
                "service.namespace": cluster,
                "service.instance.id": instance,
            }
        )
        self._exporter = OTLPSpanExporter(
            endpoint=endpoint, insecure=url.scheme != "https", timeout=EXPORT_TIMEOUT_S
        )
        self._processor = BatchSpanProcessor(
            self._exporter, max_queue_size=MAX_QUEUED, schedule_delay_millis=SEND_EVERY_MS
        )
        self._closed = False

    def export(
        self,
        name: str,
        parent: str,
        span_id: str,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, Attribute],
        failed: bool,
    ) -> None:
        """Queue one span. `parent` is a sampled traceparent; never waits."""
        trace_id = int(parent[3:35], 16)
        self._processor.on_end(
            ReadableSpan(
                name=name,
                context=SpanContext(trace_id, int(span_id, 16), False, _SAMPLED),
                parent=SpanContext(trace_id, int(parent[36:52], 16), True, _SAMPLED),
                resource=self._resource,
                attributes=attributes,
                kind=SpanKind.INTERNAL,
                status=_FAILED if failed else _OK,
                start_time=start_ns,
                end_time=end_ns,
                instrumentation_scope=_SCOPE,
            )
        )

    def close(self) -> None:
        """Send what waits, for at most `CLOSE_TIMEOUT_S`, then drop it. Safe to call twice."""
        if not self._closed:
            self._closed = True
            closing = threading.Thread(target=self._processor.shutdown, daemon=True)
            closing.start()
            closing.join(CLOSE_TIMEOUT_S)
            if closing.is_alive():
                self._exporter.shutdown()
