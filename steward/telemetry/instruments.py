"""How the catalog makes metrics: registered, and with every label set there from the start.

Exemplars: a latency that was seen in a sampled trace carries that trace's id, and Prometheus
takes it from the OpenMetrics exposition. `exemplar_of` gives None for any other trace, so
nothing is paid for those that nobody keeps.
"""

from collections.abc import Iterable, Sequence
from itertools import product

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

from steward.telemetry.tracing import is_sampled

disable_created_metrics()  # type: ignore[no-untyped-call]

FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Buckets in seconds for what should take milliseconds."""

SLOW = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Buckets in seconds for what people wait for."""

TINY = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Buckets in seconds for what should take no time at all."""


def exemplar_of(traceparent: str) -> dict[str, str] | None:
    """The exemplar of an observation in this trace; None unless the trace is sampled."""
    return {"trace_id": traceparent[3:35]} if is_sampled(traceparent) else None


class Instruments:
    """Makes metrics in one registry. Labels are given with all their values."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, help: str, **labels: Sequence[str]) -> Counter:
        """A counter; each combination of the values is a series that begins at 0."""
        metric = Counter(name, help, list(labels), registry=self._registry)
        for values in _combinations(labels.values()):
            metric.labels(*values)
        return metric

    def gauge(self, name: str, help: str, **labels: Sequence[str]) -> Gauge:
        """A gauge; each combination of the values is a series that begins at 0."""
        metric = Gauge(name, help, list(labels), registry=self._registry)
        for values in _combinations(labels.values()):
            metric.labels(*values)
        return metric

    def histogram(
        self, name: str, help: str, buckets: Sequence[float], **labels: Sequence[str]
    ) -> Histogram:
        """A histogram with these upper bounds, in its unit."""
        metric = Histogram(name, help, list(labels), buckets=buckets, registry=self._registry)
        for values in _combinations(labels.values()):
            metric.labels(*values)
        return metric


def _combinations(values: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Of an empty list none: a metric without labels is its own only series."""
    return [combination for combination in product(*values) if combination]
