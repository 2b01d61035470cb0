"""`Row`: one figure of a benchmark, with every round of it and what it has to reach."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. `values` are those of the rounds, in `unit`.

    `goal` is in the same unit; whether it is reached is judged by the median. `lower_is_better`
    says in which direction.
    """

    what: str
    unit: str
    values: Sequence[float]
    goal: float | None = None
    lower_is_better: bool = False
    missing: str = ""

    @property
    def median(self) -> float:
        """Of the rounds. Raises StatisticsError when there are none."""
        return statistics.median(self.values)

    @property
    def reached(self) -> bool | None:
        """Whether the goal is met; None without one, or without a value."""
        if self.goal is None or not self.values:
            return None
        return self.median <= self.goal if self.lower_is_better else self.median >= self.goal

    def cells(self) -> tuple[str, str, str, str]:
        """What, median, spread, goal, as text."""
        sign = "≤" if self.lower_is_better else "≥"
        goal = "" if self.goal is None else f"{sign} {number(self.goal)}"
        if not self.values:
            return self.what, f"**not measured**: {self.missing}", "", goal
        low, high = min(self.values), max(self.values)
        spread = f"{number(low)} to {number(high)}" if len(self.values) > 1 else ""
        if self.reached is False:
            goal += ", **missed**"
        return self.what, f"{number(self.median)} {self.unit}".rstrip(), spread, goal


def text_table(rows: Sequence[Row]) -> str:
    """The rows for a terminal: what, median, spread, goal."""
    cells = [row.cells() for row in rows]
    widths = [max(len(cell[column]) for cell in cells) for column in range(3)]
    return "\n".join(
        f"{what:<{widths[0]}}  {median:>{widths[1]}}  {spread:<{widths[2]}}  {goal}".rstrip()
        for what, median, spread, goal in cells
    )


def number(value: float) -> str:
    """Three figures, or whole thousands."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
