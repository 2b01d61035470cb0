"""Alerts on budgets of objectives: two for each, see `slos`."""

from steward.telemetry.alert import Alert
from steward.telemetry.slos import FAST_BURNS, SLOS, SLOW_BURNS, Slo, burns

_WHERE_TO_LOOK = {
    "connect": "Split `steward_edge_handshakes_total` by `result` and `instance`.",
    "attach": "Compare with `steward_registry_resolve_seconds` and "
    "`steward_agent_activate_seconds`: the registry, or the seal in the log.",
    "first_event": "Compare with `steward_agent_append_seconds`, and look at "
    "`steward_agent_queued_runs` and at the lag of the agents' loop.",
    "append": "Compare with `steward_log_commit_seconds`: the log's disk, or the way to it.",
    "delivery": "Split `steward_edge_append_to_socket_seconds` by `instance`: one edge is its CPU "
    "or its machine's clock, all of them are the nodes.",
    "resume": "A reset is a stream that ended or was compacted behind the client: look at "
    "`log.keep_days`, and at StewardAcknowledgedEventsLost.",
    "failover": "Split `steward_registry_fences_total` by `evidence`; D waits for the whole lease.",
    "handoff": "Runs that don't end hold a move up: look at `steward_agent_open_runs` of the node.",
}


def budget_alerts() -> list[Alert]:
    """Each objective's budget burns, fast or slowly."""
    return [alert for slo in SLOS for alert in _of(slo)]


def _of(slo: Slo) -> tuple[Alert, Alert]:
    promise = f"{slo.target:.4%}".rstrip("0%").rstrip(".") + f" % {slo.promise}"
    look = _WHERE_TO_LOOK[slo.name]
    then = "The SLO dashboard shows since when, and how much of the budget is left."
    return (
        Alert(
            f"Steward{slo.title}BudgetBurnsFast",
            burns(slo, FAST_BURNS),
            "2m",
            "page",
            f"Far more than allowed fails: {promise}",
            f"At this rate the budget of a month is gone within days: {promise}.",
            (look, then, "Was something rolled out? Take it back first, and look then."),
        ),
        Alert(
            f"Steward{slo.title}BudgetBurnsSlowly",
            burns(slo, SLOW_BURNS),
            "15m",
            "warning",
            f"More than allowed fails, for hours: {promise}",
            f"Some users see it; the budget will not last the month: {promise}.",
            (look, then, "It needs nobody at night; plan what mends it."),
        ),
    )
