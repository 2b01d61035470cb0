"""Alert and recording rules as Prometheus takes them.

An expression is written over texts made from the catalog, so a metric or a label that
does not exist fails when this module runs, not in the night.

`StewardSsotViolation` fires on breaches only: a refusal means that a guard worked. It looks at
what each process saw, and at what the registry recorded, since either may be the one left.
"""

from steward.telemetry.alert import Alert
from steward.telemetry.alert_budgets import budget_alerts
from steward.telemetry.alert_load import load_alerts
from steward.telemetry.alert_rules import availability_alerts, invariant_alerts
from steward.telemetry.slos import recordings

RUNBOOKS = "docs/runbooks.md"
ALERT_GROUP, RECORDING_GROUP = "steward", "steward-slos"


def alerts() -> list[Alert]:
    """All rules, the worst first."""
    return [*invariant_alerts(), *availability_alerts(), *load_alerts(), *budget_alerts()]


def runbook_of(alert: Alert) -> str:
    """Where its section is."""
    return f"{RUNBOOKS}#{alert.name.lower()}"


def render_rules() -> str:
    """The file of alert rules."""
    lines = ["groups:", f"  - name: {ALERT_GROUP}", "    rules:"]
    for alert in alerts():
        lines += [
            f"      - alert: {alert.name}",
            f"        expr: >-\n          {alert.expression}",
            f"        for: {alert.hold}",
            f"        labels:\n          severity: {alert.severity}",
            "        annotations:",
            f"          summary: >-\n            {alert.summary}",
            f"          description: >-\n            {alert.steps[0]}",
            f"          runbook: {runbook_of(alert)}",
        ]
    return "\n".join(lines) + "\n"


def render_recordings() -> str:
    """The file of recording rules."""
    lines = ["groups:", f"  - name: {RECORDING_GROUP}", "    rules:"]
    for rule in recordings():
        lines += [
            f"      - record: {rule.record}",
            f"        expr: >-\n          {rule.expression}",
            f"        labels:\n          {rule.label}: {rule.value}",
        ]
    return "\n".join(lines) + "\n"
