"""Alert rules as code. Each one pages or warns for something that a person can act on.

An expression is written over `Query` texts made from the catalog, so a metric or a label
that does not exist fails when this module runs, not in the night.

`StewardSsotViolation` fires on breaches only: a refusal means that a guard worked. It looks at
what each process saw, and at what the registry recorded, since either may be the one left. A
counter with labels begins to exist with its first increment, and `increase` does not see
that step; so a series that is new counts as well.
"""

from dataclasses import dataclass

from steward.telemetry.catalog import SERVICES
from steward.telemetry.inventory import Kind, rows_by_name

JOB = "steward"


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule. `hold` is how long the expression must be true; `severity` is page or warning."""

    name: str
    expression: str
    hold: str
    severity: str
    summary: str
    action: str


def series(name: str, **labels: str) -> str:
    """A selector over a counter or gauge of the catalog; label values are regular expressions.

    Raises LookupError for a metric or a label that the catalog does not have.
    """
    row = rows_by_name()[name]
    if row.kind is Kind.HISTOGRAM:
        raise LookupError(f"{name} is a histogram; use quantile()")
    unknown = set(labels) - set(row.labels)
    if unknown:
        raise LookupError(f"{name} has no label {sorted(unknown)}")
    matchers = ",".join(f'{label}=~"{value}"' for label, value in labels.items())
    return f"{name}{{{matchers}}}" if matchers else name


def quantile(q: float, name: str, by: str = "", window: str = "5m") -> str:
    """A quantile of a histogram of the catalog over all its series, split by `by`."""
    row = rows_by_name()[name]
    if row.kind is not Kind.HISTOGRAM:
        raise LookupError(f"{name} is not a histogram")
    group = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({group}) (rate({name}_bucket[{window}])))"


def alerts() -> list[Alert]:
    """All rules, the worst first."""
    seen = series("steward_breaches_total")
    recorded = series("steward_registry_violations_total", severity="breach")
    nodes_up = series("steward_registry_nodes", state="up")
    handshakes = "steward_edge_handshakes_total"
    refused_for_us = series(handshakes, result="MANAGER_UNAVAILABLE|NO_CAPACITY|INTERNAL")
    no_store = series("steward_auth_checks_total", result="STORE_UNAVAILABLE")
    return [
        Alert(
            "StewardSsotViolation",
            f"{_grew(seen)} or {_grew(recorded)}",
            "0m",
            "page",
            "A breach, {{ $labels.kind }}, was seen or recorded by {{ $labels.instance }}",
            "Run `steward violations --breaches` for the evidence, keep the stores as they are, "
            "and go by the breach's row in docs/violations.md.",
        ),
        *(
            Alert(
                f"Steward{service.capitalize()}Absent",
                f'absent(up{{job="{JOB}",service="{service}"}} == 1)',
                "1m",
                "page",
                f"No {service} process answers",
                _ABSENT[service],
            )
            for service in SERVICES
        ),
        Alert(
            "StewardNoNodeUp",
            f"sum({nodes_up}) == 0",
            "30s",
            "page",
            "The registry sees no agent node: nobody gets a manager",
            "Look at the agent nodes' `/readyz` on the ops port: it says what they wait for.",
        ),
        Alert(
            "StewardHandshakesFail",
            f"sum(rate({refused_for_us}[5m])) / sum(rate({series(handshakes)}[5m])) > 0.05",
            "5m",
            "page",
            "More than 5 % of the handshakes fail for a reason on our side",
            "Split `steward_edge_handshakes_total` by `result`; NO_CAPACITY wants more edges or "
            "nodes, MANAGER_UNAVAILABLE a look at registry and nodes.",
        ),
        Alert(
            "StewardAuthStoreUnavailable",
            f"sum(rate({no_store}[5m])) > 0",
            "2m",
            "page",
            "Auth can't reach its store: tickets and logins are refused",
            "Look at the disk of auth and at its log; tokens are still checked.",
        ),
        Alert(
            "StewardAppendsSlow",
            f"{quantile(0.99, 'steward_agent_append_seconds')} > 0.25",
            "5m",
            "warning",
            "p99 of appends is over 250 ms: every event is shown that much later",
            "Compare with `steward_log_commit_seconds`: the disk of the log, or the way to it.",
        ),
        Alert(
            "StewardDeliverySlow",
            f"{quantile(0.99, 'steward_edge_delivery_seconds', 'instance')} > 0.1",
            "5m",
            "warning",
            "Edge {{ $labels.instance }} needs over 100 ms to write what it has",
            "It has too many connections or events for its CPU: add edges.",
        ),
        Alert(
            "StewardLoopLag",
            f"{quantile(0.99, 'steward_loop_lag_seconds', 'service, instance')} > 0.25",
            "5m",
            "warning",
            "The event loop of {{ $labels.instance }} runs timers over 250 ms late",
            "Something blocks the loop or the CPU is exhausted; past a second, leases are at risk.",
        ),
        Alert(
            "StewardNodesFenced",
            f"sum(increase({series('steward_registry_fences_total')}[15m])) > 3",
            "0m",
            "warning",
            "More than three node incarnations were fenced within 15 minutes",
            "Split by `evidence`: C and D without A or B mean lost beats, so load or network.",
        ),
    ]


def _grew(counter: str) -> str:
    """Whether a counter grew within ten minutes, or began to exist."""
    return f"(({counter} unless {counter} offset 10m) > 0) or (increase({counter}[10m]) > 0)"


_ABSENT = {
    "registry": "Connected users go on; new ones get no manager. Start it; one process per store.",
    "auth": "Open connections go on until their token ends; new ones are refused. Start it.",
    "log": "Nothing can be appended: all runs wait. Start it on its volume.",
    "agent": "No manager can live. Start agent nodes.",
    "edge": "Nobody can connect. Start edges.",
}


def render_rules() -> str:
    """The rules file for Prometheus."""
    lines = ["groups:", "  - name: steward", "    rules:"]
    for alert in alerts():
        lines += [
            f"      - alert: {alert.name}",
            f"        expr: >-\n          {alert.expression}",
            f"        for: {alert.hold}",
            f"        labels:\n          severity: {alert.severity}",
            "        annotations:",
            f"          summary: >-\n            {alert.summary}",
            f"          description: >-\n            {alert.action}",
        ]
    return "\n".join(lines) + "\n"
