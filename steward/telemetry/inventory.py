"""The metric catalog as data: one row per metric, for docs, alerts, dashboards and checks.

Read from the classes of `steward.telemetry.catalog` themselves, so that it can't say
anything else than what services export.
"""

from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from steward.telemetry.catalog import SERVICES, ServiceMetrics

EVERY_SERVICE = "every service"


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
    rows = []
    for metric in vars(cls(CollectorRegistry())).values():
        kind = _KINDS.get(type(metric))
        if kind is None:
            continue
        family = metric.describe()[0]
        suffix = "_total" if kind is Kind.COUNTER else ""
        # prometheus-client shows label names nowhere in public while there is no child.
        labels = tuple(metric._labelnames)
        rows.append(MetricRow(family.name + suffix, kind, family.documentation, labels, service))
    return rows
