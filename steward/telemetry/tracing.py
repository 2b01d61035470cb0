"""Traces: one look at the sampled bit decides, and when it is off nothing else happens.

Trace context travels inside stream messages as a W3C `traceparent`, since one
multiplexed stream has no metadata per event. `Tracing.new_root` makes the context of a
new trace (always, because every event names its trace); `Tracing.record` exports a span
of a sampled trace and is a no-op that returns its parent for any other. Without an
endpoint nothing is sampled and OpenTelemetry is not even imported.
"""

import os
import time
from collections.abc import Mapping
from typing import Protocol

Attribute = str | int | bool | float

_UNSAMPLED = "-00"


def is_sampled(traceparent: str) -> bool:
    """Whether spans of this trace are kept: the last bit of the flags."""
    return bool(traceparent) and traceparent[-1] in "13579bdf"


def is_traceparent(text: str) -> bool:
    """Whether `text` is a version 00 traceparent with non-zero ids (W3C Trace Context)."""
    if len(text) != 55 or text[:3] != "00-" or text[35] != "-" or text[52] != "-":
        return False
    ids = text[3:35] + text[36:52] + text[53:]
    if any(c not in "0123456789abcdef" for c in ids):
        return False
    return text[3:35] != "0" * 32 and text[36:52] != "0" * 16


class SpanExporter(Protocol):
    """Where sampled spans go. `span_id` is lower-case hex; times are Unix nanoseconds."""

    def export(
        self,
        name: str,
        parent: str,
        span_id: str,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, Attribute],
        failed: bool,
    ) -> None: ...

    def close(self) -> None: ...


class Tracing:
    """Makes trace contexts and records spans for one service."""

    __slots__ = ("_exporter", "_threshold")

    def __init__(self, exporter: SpanExporter | None = None, ratio: float = 0.0) -> None:
        self._exporter = exporter
        self._threshold = int(min(max(ratio, 0.0), 1.0) * (1 << 32)) if exporter else 0

    @property
    def enabled(self) -> bool:
        """Whether spans go anywhere. False: nobody needs to look at a sampled bit."""
        return self._exporter is not None

    def new_root(self) -> str:
        """A new trace context; sampled with the configured ratio, when spans go anywhere."""
        ids = os.urandom(24).hex()
        sampled = int(ids[:8], 16) < self._threshold
        return f"00-{ids[:32]}-{ids[32:]}{'-01' if sampled else _UNSAMPLED}"

    def child(self, parent: str) -> str:
        """The context of a span that will be recorded later, for its children to refer to.

        Returns `parent` when nothing of its trace is kept.
        """
        if self._exporter is None or not is_sampled(parent):
            return parent
        return f"{parent[:36]}{os.urandom(8).hex()}-01"

    def record(
        self,
        name: str,
        parent: str,
        start_ns: int,
        attributes: Mapping[str, Attribute],
        *,
        context: str = "",
        failed: bool = False,
    ) -> str:
        """Export a span that started at `start_ns` (time.time_ns) and ends now.

        `context` is what `child(parent)` gave, if children were made before. Returns the
        context for children: the new span, or `parent` when not sampled.
        """
        exporter = self._exporter
        if exporter is None or not is_sampled(parent):
            return parent
        context = context or self.child(parent)
        exporter.export(name, parent, context[36:52], start_ns, time.time_ns(), attributes, failed)
        return context

    def close(self) -> None:
        """Flush what waits. Safe to call twice."""
        if self._exporter is not None:
            self._exporter.close()
