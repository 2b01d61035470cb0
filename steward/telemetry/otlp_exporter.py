"""Spans to an OpenTelemetry collector: OpenTelemetry's SDK and its OTLP exporter, in one thread.

Ids are those that travel in the `traceparent`, never made here, so that the spans of all
services join into one trace. What was recorded is queued as it is; a thread of its own makes the
SDK's spans of it and gives them to the SDK's exporter, so its environment variables apply
(`OTEL_EXPORTER_OTLP_HEADERS`, `..._CERTIFICATE`, `..._COMPRESSION`, `..._TIMEOUT`,
`OTEL_RESOURCE_ATTRIBUTES`).
Only `steward.telemetry.otlp` imports this module, and only when an endpoint is set: the SDK costs
a quarter of a second at start.

The event loop shares its interpreter with that thread, and one that computes for long makes it
wait. So batches are encoded a slice at a time, with a rest after each.

Guaranteed: recording never waits for the collector. Not guaranteed: delivery. At most
`MAX_QUEUED` spans wait, and the oldest are dropped first. A batch is dropped when the exporter has
given it up, which it does after its timeout. What was dropped is counted, and logged.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from time import monotonic
from typing import overload
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from steward.telemetry.logs import BUG, fields
from steward.telemetry.tracing import FinishedSpan, Kind

MAX_QUEUED = 8192
"""Spans that may wait for the collector."""

SLICE = 16
"""Spans that are encoded in one go, some 50 µs each."""
PAUSE_S = 0.001
MOST_PER_BATCH = 128
"""The encoder puts a batch together in one go at its end, some 4 µs for each span."""
SEND_EVERY_S = 0.5
FULL = 2048
"""With so many waiting they are sent at once."""
CLOSE_TIMEOUT_S = 2.0
END_TIMEOUT_S = 0.5
TELL_EVERY_S = 10.0

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("steward", version("steward"))
_UNSET = Status(StatusCode.UNSET)
_FAILED = Status(StatusCode.ERROR)
_KINDS = {
    Kind.INTERNAL: SpanKind.INTERNAL,
    Kind.SERVER: SpanKind.SERVER,
    Kind.PRODUCER: SpanKind.PRODUCER,
    Kind.CONSUMER: SpanKind.CONSUMER,
}

_log = logging.getLogger(__name__)


class OtlpExporter:
    """A `steward.telemetry.tracing.SpanExporter` over a background thread."""

    def __init__(self, service: str, instance: str, cluster: str, endpoint: str) -> None:
        """`endpoint`: `host:port` or `http://host:port` in clear text, `https://…` with TLS."""
        self._resource = Resource.create(
            {
                "service.name": f"steward-{service}",
                "service.namespace": cluster,
                "service.instance.id": instance,
                "service.version": version("steward"),
            }
        )
        insecure = urlsplit(endpoint).scheme != "https"
        self._endpoint = endpoint
        self._exporter = OTLPSpanExporter(endpoint=endpoint, insecure=insecure)
        self._queue: deque[FinishedSpan] = deque(maxlen=MAX_QUEUED)
        self._dropped = 0
        self._told = 0
        self._told_at = -TELL_EVERY_S
        self._counting = threading.Lock()
        self._due = threading.Event()
        self._closing = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Spans that were recorded and did not reach the collector."""
        return self._dropped

    @property
    def waiting(self) -> int:
        """Spans in the queue."""
        return len(self._queue)

    def export(self, span: FinishedSpan) -> None:
        """Queue one span; never waits."""
        queue = self._queue
        if len(queue) == MAX_QUEUED:
            self._drop(1)
        queue.append(span)
        if len(queue) == FULL:
            self._due.set()

    def close(self) -> None:
        """Send what waits, for at most `CLOSE_TIMEOUT_S`, then drop it. Safe to call twice."""
        if self._closed:
            return
        self._closing.set()
        self._due.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        self._closed = True
        # Ends a call that is under way, and a wait for the next try.
        self._exporter.shutdown()
        self._thread.join(END_TIMEOUT_S)
        self._drop(len(self._queue))
        self._queue.clear()
        self._tell()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._due.wait(SEND_EVERY_S)
            self._due.clear()
            self._send_waiting()
            if monotonic() - self._told_at >= TELL_EVERY_S:
                self._tell()
        self._send_waiting()

    def _send_waiting(self) -> None:
        queue = self._queue
        while queue and not self._closed:
            spans = [queue.popleft() for _ in range(min(len(queue), MOST_PER_BATCH))]
            if not self._sent(Batch(spans, self._resource, self._rest)):
                self._drop(len(spans))

    def _sent(self, batch: "Sequence[ReadableSpan]") -> bool:
        try:
            return self._exporter.export(batch) is SpanExportResult.SUCCESS
        except Exception:
            # Whatever is wrong with this batch, those behind it are to be sent.
            if not self._closed:
                _log.exception(
                    "spans could not be exported", extra=fields(endpoint=self._endpoint, do=BUG)
                )
            return False

    def _rest(self) -> None:
        # At the end nobody waits for the interpreter but who waits for this thread.
        self._closing.wait(PAUSE_S)

    def _drop(self, count: int) -> None:
        with self._counting:
            self._dropped += count

    def _tell(self) -> None:
        count = self._dropped - self._told
        if count:
            self._told += count
            self._told_at = monotonic()
            _log.warning("spans were dropped", extra=fields(count=count, endpoint=self._endpoint))


class Batch(Sequence[ReadableSpan]):
    """Recorded spans as those of the SDK, each made when it is asked for.

    The SDK's encoder goes through them once, and encodes each as it comes. So where the iterator
    rests, it does: after each `SLICE`.
    """

    def __init__(
        self, spans: Sequence[FinishedSpan], resource: Resource, rest: Callable[[], None]
    ) -> None:
        self._spans = spans
        self._resource = resource
        self._rest = rest

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> ReadableSpan: ...

    @overload
    def __getitem__(self, index: slice) -> "Batch": ...

    def __getitem__(self, index: int | slice) -> "ReadableSpan | Batch":
        if isinstance(index, slice):
            return Batch(self._spans[index], self._resource, self._rest)
        return readable(self._spans[index], self._resource)

    def __iter__(self) -> Iterator[ReadableSpan]:
        spans = iter(self._spans)
        while part := list(islice(spans, SLICE)):
            for span in part:
                yield readable(span, self._resource)
            self._rest()


def readable(span: FinishedSpan, resource: Resource) -> ReadableSpan:
    """The SDK's span of what was recorded."""
    return ReadableSpan(
        name=span.name,
        context=_context(span.context, remote=False),
        parent=_context(span.parent, remote=True) if span.parent else None,
        resource=resource,
        attributes=span.attributes,
        kind=_KINDS[span.kind],
        links=[Link(_context(link.context, remote=True), link.attributes) for link in span.links],
        status=_FAILED if span.failed else _UNSET,
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=_SCOPE,
    )


def _context(traceparent: str, *, remote: bool) -> SpanContext:
    trace_id, span_id = int(traceparent[3:35], 16), int(traceparent[36:52], 16)
    return SpanContext(trace_id, span_id, remote, _SAMPLED)
