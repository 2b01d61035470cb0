"""Traces: one look at the sampled bit decides, and when it is off nothing else happens.

Trace context travels inside stream messages as a W3C `traceparent`, since one
multiplexed stream has no metadata per event. `Tracing.new_root` makes the context of a
new trace (always, because every event names its trace); `Tracing.record` exports a span
of a sampled trace and is a no-op that returns its parent for any other. Without an
endpoint nothing is sampled and OpenTelemetry is not even imported.

Sampling is parent-based: the service in which a trace begins decides with its ratio, and
everybody else keeps that. A span that must be seen (`upgraded=True`: an error, a failover, a
violation) is exported in any case, and the context that `record` returns then has the sampled
bit set, so that what follows from it is seen too. What came before is not: it was never kept.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple, Protocol

from steward.telemetry.conventions import UPGRADED

Attribute = str | int | bool | float

_IN_EVENT = b'"trace":"'
_UNSAMPLED = "-00"
_SAMPLED = "-01"
_NO_ATTRIBUTES: Mapping[str, Attribute] = MappingProxyType({})


class Kind(StrEnum):
    """On which side of a boundary a span is, as OpenTelemetry names it."""

    INTERNAL = "internal"
    SERVER = "server"
    PRODUCER = "producer"
    CONSUMER = "consumer"


@dataclass(frozen=True, slots=True)
class Link:
    """Another span that this one is joined with, without being its child."""

    context: str
    attributes: Mapping[str, Attribute] = field(default_factory=lambda: _NO_ATTRIBUTES)


class FinishedSpan(NamedTuple):
    """A span that is over. `context` and `parent` are traceparents of one trace, `context` sampled.

    `parent` is empty for the first span of a trace. Times are Unix nanoseconds.
    """

    name: str
    context: str
    parent: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Attribute]
    failed: bool = False
    kind: Kind = Kind.INTERNAL
    links: Sequence[Link] = ()


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


def new_traceparent(*, sampled: bool) -> str:
    """The context of a new trace, with random ids."""
    ids = os.urandom(24).hex()
    return f"00-{ids[:32]}-{ids[32:]}{_SAMPLED if sampled else _UNSAMPLED}"


def trace_of(event: bytes) -> str:
    """The context in the envelope of an event. What users wrote comes behind it, or is escaped."""
    at = event.find(_IN_EVENT) + len(_IN_EVENT)
    return event[at : at + 55].decode("ascii", "replace") if at >= len(_IN_EVENT) else ""


class SpanExporter(Protocol):
    """Where spans go."""

    def export(self, span: FinishedSpan) -> None:
        """Take a span; never waits."""
        ...

    def close(self) -> None: ...


class Tracing:
    """Makes trace contexts and records spans for one service."""

    __slots__ = ("_exporter", "_threshold", "content")

    def __init__(
        self, exporter: SpanExporter | None = None, ratio: float = 0.0, *, content: bool = False
    ) -> None:
        """`ratio`: the share of traces begun here that are sampled, 0 to 1."""
        self._exporter = exporter
        self.content = content
        """Whether what users and agents wrote may be an attribute."""
        self._threshold = int(min(max(ratio, 0.0), 1.0) * (1 << 32)) if exporter else 0

    @property
    def enabled(self) -> bool:
        """Whether spans go anywhere. False: nobody needs to look at a sampled bit."""
        return self._exporter is not None

    def new_root(self) -> str:
        """The context of the first span of a trace; sampled with the configured ratio."""
        ids = os.urandom(24).hex()
        sampled = int(ids[:8], 16) < self._threshold
        return f"00-{ids[:32]}-{ids[32:]}{_SAMPLED if sampled else _UNSAMPLED}"

    def child(self, parent: str, *, upgraded: bool = False) -> str:
        """The context of a span that will be recorded later, for its children to refer to.

        Returns `parent` when nothing of its trace is kept.
        """
        if self._exporter is None or not (upgraded or is_sampled(parent)):
            return parent
        return f"{parent[:36]}{os.urandom(8).hex()}{_SAMPLED}"

    def record(
        self,
        name: str,
        parent: str,
        start_ns: int,
        attributes: Mapping[str, Attribute],
        *,
        context: str = "",
        failed: bool = False,
        kind: Kind = Kind.INTERNAL,
        links: Sequence[Link] = (),
        upgraded: bool = False,
        end_ns: int = 0,
    ) -> str:
        """Export a span that started at `start_ns` (time.time_ns) and ends now, or at `end_ns`.

        `context` is what `child(parent)` or `new_root()` gave, if children were made before; with
        `new_root()`, `parent` is empty. `upgraded`: also when the trace is not sampled. Returns
        the context for children: the new span, or `parent` when not kept.
        """
        exporter = self._exporter
        known = context or parent
        sampled = is_sampled(known)
        if exporter is None or not (sampled or upgraded):
            return known
        if not sampled:
            attributes = {**attributes, UPGRADED: True}
            if context:
                context = context[:52] + _SAMPLED
        if not context:
            context = self.child(parent, upgraded=True) if parent else new_traceparent(sampled=True)
        exporter.export(
            FinishedSpan(
                name,
                context,
                parent,
                start_ns,
                end_ns or time.time_ns(),
                attributes,
                failed,
                kind,
                links,
            )
        )
        return context

    def close(self) -> None:
        """Flush what waits. Safe to call twice."""
        if self._exporter is not None:
            self._exporter.close()
