"""Queries as text, made from the catalog: what does not exist can't be asked for.

Every function raises LookupError for a metric or a label that the catalog does not have, so a
wrong expression fails when it is written, not in the night.
"""

from functools import cache

from steward.telemetry.inventory import Kind, MetricRow, rows_by_name

JOB = "steward"


@cache
def _rows() -> dict[str, MetricRow]:
    return rows_by_name()


def series(name: str, **labels: str) -> str:
    """A selector over a counter or gauge; label values are regular expressions.

    `instance` and `service` are labels of every series: the scrape puts them there.
    """
    row = _rows()[name]
    if row.kind is Kind.HISTOGRAM:
        raise LookupError(f"{name} is a histogram; use quantile() or within()")
    return name + _matchers(row, labels)


def rate(name: str, window: str = "5m", by: str = "", **labels: str) -> str:
    """How often per second, over all processes, split by `by`."""
    return f"{_sum(by)}(rate({series(name, **labels)}[{window}]))"


def increase(name: str, window: str, by: str = "", **labels: str) -> str:
    """How often within the window, over all processes, split by `by`."""
    return f"{_sum(by)}(increase({series(name, **labels)}[{window}]))"


def total(name: str, by: str = "", **labels: str) -> str:
    """A gauge, over all processes, split by `by`."""
    return f"{_sum(by)}({series(name, **labels)})"


def quantile(q: float, name: str, by: str = "", window: str = "5m", **labels: str) -> str:
    """A quantile of a histogram over all its series, split by `by`."""
    buckets = part(name, "bucket", **labels)
    group = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({group}) (rate({buckets}[{window}])))"


def part(name: str, suffix: str, **labels: str) -> str:
    """A selector over `_bucket`, `_sum` or `_count` of a histogram."""
    row = _rows()[name]
    if row.kind is not Kind.HISTOGRAM:
        raise LookupError(f"{name} is not a histogram")
    return f"{name}_{suffix}" + _matchers(row, labels)


def grew(counter: str) -> str:
    """Whether a counter grew within ten minutes, or came with a value that it did not have.

    `increase` does not see what was counted before the first scrape of a new process.
    """
    return f"(({counter} unless {counter} offset 10m) > 0) or (increase({counter}[10m]) > 0)"


def _matchers(row: MetricRow, labels: dict[str, str]) -> str:
    own = {*row.labels, "instance", "service"}
    if row.kind is Kind.HISTOGRAM:
        own.add("le")
    unknown = set(labels) - own
    if unknown:
        raise LookupError(f"{row.name} has no label {sorted(unknown)}")
    matchers = ",".join(f'{label}=~"{value}"' for label, value in labels.items())
    return f"{{{matchers}}}" if matchers else ""


def _sum(by: str) -> str:
    return f"sum by ({by}) " if by else "sum"
