"""THE metric catalog: every metric that Steward exports, by service.

Names follow Prometheus' rules: unit suffix, `_total` on counters. No user, tenant,
session or run is ever a label. Label children are resolved once, by the one who
counts, never per event. Dashboards, alerts and docs are made from these classes, and a
test compares them with what running services export.
"""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

disable_created_metrics()  # type: ignore[no-untyped-call]

FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Buckets in seconds for what should take milliseconds."""

SLOW = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Buckets in seconds for what people wait for."""


class ServiceMetrics:
    """What every service has."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.loop_lag = Histogram(
            "steward_loop_lag_seconds",
            "How late the event loop ran a timer.",
            buckets=FAST,
            registry=registry,
        )
        self.refusals = Counter(
            "steward_refusals_total",
            "Guards of this process that worked: stale appends, forged placements.",
            ["kind"],
            registry=registry,
        )
        self.breaches = Counter(
            "steward_breaches_total",
            "Invariants seen broken by this process. Must stay zero.",
            ["kind"],
            registry=registry,
        )


class RegistryMetrics(ServiceMetrics):
    """registry"""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.placements = Gauge(
            "steward_registry_placements", "Users with a placement.", registry=registry
        )
        self.nodes = Gauge(
            "steward_registry_nodes", "Agent nodes by state.", ["state"], registry=registry
        )
        self.edges = Gauge("steward_registry_edges", "Edge sessions.", registry=registry)
        self.resolves = Counter(
            "steward_registry_resolves_total",
            "Users resolved, by how: cached, placed, refused.",
            ["result"],
            registry=registry,
        )
        self.fences = Counter(
            "steward_registry_fences_total",
            "Node incarnations fenced, by evidence class A to E.",
            ["evidence"],
            registry=registry,
        )
        self.violations = Counter(
            "steward_registry_violations_total",
            "Violations recorded, by severity (refusal, breach) and kind; breaches must stay zero.",
            ["severity", "kind"],
            registry=registry,
        )
        self.commit_seconds = Histogram(
            "steward_registry_commit_seconds",
            "Duration of a store transaction.",
            buckets=FAST,
            registry=registry,
        )
        self.resolve_seconds = Histogram(
            "steward_registry_resolve_seconds",
            "From a resolve request to its answer.",
            buckets=FAST,
            registry=registry,
        )


class AgentMetrics(ServiceMetrics):
    """agent"""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.managers = Gauge("steward_agent_managers", "Live managers.", registry=registry)
        self.runs = Gauge("steward_agent_open_runs", "Runs that have started.", registry=registry)
        self.queued = Gauge("steward_agent_queued_runs", "Runs that wait.", registry=registry)
        self.runs_total = Counter(
            "steward_agent_runs_total", "Runs ended, by outcome.", ["outcome"], registry=registry
        )
        self.events = Counter(
            "steward_agent_events_total", "Events appended, by type.", ["type"], registry=registry
        )
        self.append_seconds = Histogram(
            "steward_agent_append_seconds",
            "From an append request to its outcome.",
            buckets=FAST,
            registry=registry,
        )
        self.activate_seconds = Histogram(
            "steward_agent_activate_seconds",
            "From an attach without a manager to a manager.",
            buckets=FAST,
            registry=registry,
        )
        self.failover_gap_seconds = Histogram(
            "steward_agent_failover_gap_seconds",
            "Time in which a user had no live manager, as the new one sees it.",
            buckets=SLOW,
            registry=registry,
        )
        self.handoff_gap_seconds = Histogram(
            "steward_agent_handoff_gap_seconds",
            "Time in which a user had no live manager in a planned move, as the new one sees it.",
            buckets=FAST,
            registry=registry,
        )
        self.abandoned_runs = Counter(
            "steward_agent_abandoned_runs_total",
            "Cancelled runs whose code did not end within the grace.",
            registry=registry,
        )
        self.agent_loop_lag = Histogram(
            "steward_agent_loop_lag_seconds",
            "How late the loop that runs agent code ran a timer.",
            buckets=FAST,
            registry=registry,
        )


class LogMetrics(ServiceMetrics):
    """log"""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.appended = Counter(
            "steward_log_events_total", "Events made durable.", registry=registry
        )
        self.compacted = Counter(
            "steward_log_compacted_events_total",
            "Events removed because they were older than `log.keep_days`.",
            registry=registry,
        )
        self.appends = Counter(
            "steward_log_appends_total",
            "Appends by outcome: committed, repeated, fenced, conflict.",
            ["outcome"],
            registry=registry,
        )
        self.seals = Counter(
            "steward_log_seals_total",
            "Seals by outcome: sealed, fenced.",
            ["outcome"],
            registry=registry,
        )
        self.commit_seconds = Histogram(
            "steward_log_commit_seconds",
            "Duration of a group commit.",
            buckets=FAST,
            registry=registry,
        )
        self.commit_appends = Histogram(
            "steward_log_commit_appends",
            "Appends in a group commit.",
            buckets=(1, 2, 5, 10, 25, 50, 100, 250, 500, 1000),
            registry=registry,
        )


class EdgeMetrics(ServiceMetrics):
    """edge"""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.connections = Gauge(
            "steward_edge_connections", "Open sockets, by kind.", ["kind"], registry=registry
        )
        self.users = Gauge("steward_edge_users", "Users with a connection.", registry=registry)
        self.handshakes = Counter(
            "steward_edge_handshakes_total",
            "Handshakes by result: accepted or the reason.",
            ["result"],
            registry=registry,
        )
        self.closes = Counter(
            "steward_edge_closes_total",
            "Connections ended, by close code.",
            ["code"],
            registry=registry,
        )
        self.frames_in = Counter(
            "steward_edge_frames_received_total", "Client messages.", registry=registry
        )
        self.events_out = Counter(
            "steward_edge_events_sent_total",
            "Events written, counted per connection.",
            registry=registry,
        )
        self.errors = Counter(
            "steward_edge_errors_total", "Error frames by reason.", ["reason"], registry=registry
        )
        self.resumes = Counter(
            "steward_edge_resumes_total",
            "Connections by kind of resume: new, resumed, reset.",
            ["resume"],
            registry=registry,
        )
        self.attach_seconds = Histogram(
            "steward_edge_attach_seconds",
            "From an accepted upgrade to `ready`.",
            buckets=FAST,
            registry=registry,
        )
        self.delivery_seconds = Histogram(
            "steward_edge_delivery_seconds",
            "From a batch off the node's stream to its bytes in the sockets.",
            buckets=FAST,
            registry=registry,
        )
        self.dropped = Counter(
            "steward_edge_stale_deliveries_total",
            "Deliveries of a lower epoch that were dropped.",
            registry=registry,
        )


class AuthMetrics(ServiceMetrics):
    """auth"""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.checks = Counter(
            "steward_auth_checks_total",
            "Credentials by kind and result.",
            ["kind", "result"],
            registry=registry,
        )
        self.check_seconds = Histogram(
            "steward_auth_check_seconds",
            "Time to decide one batch of credentials.",
            buckets=FAST,
            registry=registry,
        )


SERVICES: dict[str, type[ServiceMetrics]] = {
    "registry": RegistryMetrics,
    "auth": AuthMetrics,
    "log": LogMetrics,
    "agent": AgentMetrics,
    "edge": EdgeMetrics,
}
