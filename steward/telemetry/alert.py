"""What an alert is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule. `hold`: how long the expression must be true; `severity`: page or warning.

    `effect`: what users see of it. `steps`: what to do, in this order; the first one is in the
    notification too.
    """

    name: str
    expression: str
    hold: str
    severity: str
    summary: str
    effect: str
    steps: tuple[str, ...]
