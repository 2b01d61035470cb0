"""Numbers, names and periods as text."""

from collections.abc import Sequence
from typing import Any

from agent_service.agents.planner import SalesPlan
from agent_service.agents.vocabulary import MONTH_TITLES, YEAR, Dimension, Metric

Rows = list[dict[str, Any]]


def number(value: float) -> str:
    """`1,234` or `1,234.5`."""
    return f"{value:,.1f}".removesuffix(".0")


def money(value: float) -> str:
    """Whole dollars, unless there are cents."""
    return f"${value:,.2f}".removesuffix(".00")


def say_value(metric: Metric, value: float) -> str:
    return money(value) if metric == "revenue" else f"{number(value)} units"


def title(dimension: Dimension, label: str) -> str:
    """How a value of a dimension is called: `June` for `2025-06`."""
    return MONTH_TITLES[label] if dimension == "month" else label


def label(plan: SalesPlan, row: dict[str, Any]) -> str:
    """What the row of a grouped query is about."""
    return title(plan.dimension, row["label"])


def amount(plan: SalesPlan, row: dict[str, Any]) -> str:
    """The value of a row of a grouped query."""
    return say_value(plan.metric, row["value"])


def join(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def describe_filter(plan: SalesPlan) -> str:
    """`In 2025, for South and Tent,`: what a plan is restricted to, as the begin of a sentence."""
    months = plan.values("month")
    if not months or plan.dimension == "month":
        when = f"In {YEAR}"
    elif len(months) > 2 and _consecutive(months):
        when = f"From {MONTH_TITLES[months[0]]} to {MONTH_TITLES[months[-1]]} {YEAR}"
    else:
        when = f"In {join([MONTH_TITLES[month] for month in months])} {YEAR}"
    names = [
        value
        for dimension, values in plan.only
        if dimension not in ("month", plan.dimension) or _is_total_of(plan, dimension)
        for value in values
    ]
    return f"{when}, for {join(names)}," if names else f"{when},"


def _is_total_of(plan: SalesPlan, dimension: Dimension) -> bool:
    return plan.kind == "total" and dimension != "month"


def _consecutive(months: Sequence[str]) -> bool:
    numbers = [int(month[5:]) for month in months]
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))
