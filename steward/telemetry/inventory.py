"""The metric catalog as data: one row per metric, for docs, alerts, dashboards and checks.

Read from the classes of `steward.telemetry.catalog` themselves, so that it can't say
anything else than what services export.
"""

from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric

from steward.telemetry.catalog import SERVICES, ServiceMetrics

EVERY_SERVICE = "every service"
PROCESS = "process_"


class Kind(StrEnum):
    """What a metric is, in Prometheus' words."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


_KINDS: dict[type, Kind] = {
    Counter: Kind.COUNTER,
    Gauge: Kind.GAUGE,
    Histogram: Kind.HISTOGRAM,
}


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One metric. `name` is as in queries; a histogram's without `_bucket`, `_sum`, `_count`."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]
    service: str
    values: frozenset[tuple[str, ...]] = frozenset()
    """All that its labels may be together; empty without labels."""

    @property
    def series(self) -> tuple[str, ...]:
        """The names that queries may use."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


def metric_rows() -> list[MetricRow]:
    """All metrics: those of every service first, then service by service, in catalog order."""
    rows = _rows_of(ServiceMetrics, EVERY_SERVICE)
    common = {row.name for row in rows}
    for service, cls in SERVICES.items():
        rows += [row for row in _rows_of(cls, service) if row.name not in common]
    return rows


def rows_by_name() -> dict[str, MetricRow]:
    """The rows of `metric_rows`, by name."""
    return {row.name: row for row in metric_rows()}


def _rows_of(cls: type[ServiceMetrics], service: str) -> list[MetricRow]:
    made = cls(CollectorRegistry())
    rows = []
    for metric in vars(made).values():
        kind = _KINDS.get(type(metric))
        if kind is not None:
            # prometheus-client shows names and values of labels nowhere in public.
            labels = tuple(metric._labelnames)
            values = frozenset(metric._metrics) if labels else frozenset()
            rows.append(_row(metric.describe()[0], kind, labels, service, values))
    # What is read from /proc at a scrape is no attribute of the catalog.
    for family in made.registry.collect():
        if family.name.startswith(PROCESS):
            rows.append(_row(family, Kind(family.type), (), service))
    return rows


def _row(
    family: Metric,
    kind: Kind,
    labels: tuple[str, ...],
    service: str,
    values: frozenset[tuple[str, ...]] = frozenset(),
) -> MetricRow:
    suffix = "_total" if kind is Kind.COUNTER else ""
    return MetricRow(family.name + suffix, kind, family.documentation, labels, service, values)
