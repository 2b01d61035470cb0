"""THE metric catalog: every metric that Steward exports, by service.

Names follow Prometheus' rules: unit suffix, `_total` on counters. No user, tenant,
session or run is ever a label; label values are the closed sets of `labels`. Label children
are resolved once, by the one who counts, and never per event: on the way of an event there is at
most one observation per batch or flush. What would need a walk over connections or users is
counted as they come and go, so that a scrape costs the same with one as with ten thousand.
Dashboards, alerts and docs are made from these classes, and a test compares them with what
running services export.
"""

from importlib.metadata import version

from prometheus_client import CollectorRegistry

from steward.telemetry import labels as of
from steward.telemetry.instruments import FAST, SLOW, TINY, Instruments
from steward.telemetry.process_figures import ProcessFigures


class ServiceMetrics:
    """What every service has."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        registry.register(ProcessFigures())
        make = Instruments(registry)
        self.build = make.gauge(
            "steward_build_info", "1, with the version that runs.", version=(version("steward"),)
        )
        self.build.labels(version("steward")).set(1)
        self.loop_lag = make.histogram(
            "steward_loop_lag_seconds", "How late the event loop ran a timer.", FAST
        )
        self.gc_pauses = make.histogram(
            "steward_gc_pause_seconds",
            "How long the garbage collector held everything up, by generation.",
            TINY,
            generation=of.COLLECTIONS,
        )
        self.refusals = make.counter(
            "steward_refusals_total",
            "Guards of this process that worked: stale appends, forged placements.",
            kind=of.REFUSALS,
        )
        self.breaches = make.counter(
            "steward_breaches_total",
            "Invariants seen broken by this process. Must stay zero.",
            kind=of.BREACHES,
        )


class RegistryMetrics(ServiceMetrics):
    """registry"""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        make = Instruments(registry)
        self.placements = make.gauge("steward_registry_placements", "Users with a placement.")
        self.nodes = make.gauge(
            "steward_registry_nodes", "Agent nodes by state.", state=of.NODE_STATES
        )
        self.edges = make.gauge("steward_registry_edges", "Edge sessions.")
        self.waiting_commands = make.gauge(
            "steward_registry_waiting_commands", "Commands that the registry has not handled yet."
        )
        self.resolves = make.counter(
            "steward_registry_resolves_total",
            "Users resolved, by how: cached, placed, refused.",
            result=of.RESOLVE_RESULTS,
        )
        self.fences = make.counter(
            "steward_registry_fences_total",
            "Node incarnations fenced, by evidence class A to E.",
            evidence=of.EVIDENCE,
        )
        self.violations = make.counter(
            "steward_registry_violations_total",
            "Violations recorded, by severity (refusal, breach) and kind; breaches must stay zero.",
            severity=(),
            kind=(),
        )
        # Not each severity with each kind: a kind has one severity.
        for severity, kinds in (("refusal", of.REFUSALS), ("breach", of.BREACHES)):
            for kind in kinds:
                self.violations.labels(severity, kind)
        self.commit_seconds = make.histogram(
            "steward_registry_commit_seconds", "Duration of a store transaction.", FAST
        )
        self.resolve_seconds = make.histogram(
            "steward_registry_resolve_seconds", "From a resolve request to its answer.", FAST
        )
        self.census_findings = make.gauge(
            "steward_registry_census_findings",
            "What the census finds wrong now, by kind of violation. Must be zero.",
            kind=of.CENSUS_KINDS,
        )
        self.census_age = make.gauge(
            "steward_registry_census_age_seconds",
            "Since the last census that could ask everybody, or since the start.",
        )
        self.census_seconds = make.histogram(
            "steward_registry_census_seconds", "Duration of one round of the census.", SLOW
        )


class AgentMetrics(ServiceMetrics):
    """agent"""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        make = Instruments(registry)
        self.managers = make.gauge("steward_agent_managers", "Live managers.")
        self.runs = make.gauge("steward_agent_open_runs", "Runs that have started.")
        self.queued = make.gauge("steward_agent_queued_runs", "Runs that wait.")
        self.edges = make.gauge("steward_agent_edge_streams", "Edges that have a stream here.")
        self.outbox = make.gauge(
            "steward_agent_outbox_items", "Answers and deliveries that wait for their edge to read."
        )
        self.slow_edges = make.counter(
            "steward_agent_slow_edges_total", "Streams ended because their edge did not read."
        )
        self.waiting_appends = make.gauge(
            "steward_agent_waiting_appends", "Appends whose outcome is not back from the log."
        )
        self.runs_total = make.counter(
            "steward_agent_runs_total", "Runs ended, by outcome.", outcome=of.RUN_OUTCOMES
        )
        self.events = make.counter(
            "steward_agent_events_total", "Events appended, by type.", type=of.EVENT_TYPES
        )
        self.append_seconds = make.histogram(
            "steward_agent_append_seconds", "From an append request to its outcome.", FAST
        )
        self.activate_seconds = make.histogram(
            "steward_agent_activate_seconds",
            "From an attach without a manager to a manager.",
            FAST,
        )
        self.failover_gap_seconds = make.histogram(
            "steward_agent_failover_gap_seconds",
            "Time in which a user had no live manager, as the new one sees it.",
            SLOW,
        )
        self.handoff_gap_seconds = make.histogram(
            "steward_agent_handoff_gap_seconds",
            "Time in which a user had no live manager in a planned move, as the new one sees it.",
            FAST,
        )
        self.abandoned_runs = make.counter(
            "steward_agent_abandoned_runs_total",
            "Cancelled runs whose code did not end within the grace.",
        )
        self.agent_loop_lag = make.histogram(
            "steward_agent_loop_lag_seconds",
            "How late the loop that runs agent code ran a timer.",
            FAST,
        )


class LogMetrics(ServiceMetrics):
    """log"""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        make = Instruments(registry)
        self.appended = make.counter("steward_log_events_total", "Events made durable.")
        self.compacted = make.counter(
            "steward_log_compacted_events_total",
            "Events removed because they were older than `log.keep_days`.",
        )
        self.appends = make.counter(
            "steward_log_appends_total",
            "Appends by outcome: committed, repeated, fenced, conflict.",
            outcome=of.APPEND_OUTCOMES,
        )
        self.seals = make.counter(
            "steward_log_seals_total", "Seals by outcome: sealed, fenced.", outcome=of.SEAL_OUTCOMES
        )
        self.commit_seconds = make.histogram(
            "steward_log_commit_seconds", "Duration of a group commit.", FAST
        )
        self.commit_appends = make.histogram(
            "steward_log_commit_appends",
            "Appends in a group commit.",
            (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000),
        )
        self.waiting = make.gauge(
            "steward_log_waiting_operations", "Appends and seals that wait for a group commit."
        )


class EdgeMetrics(ServiceMetrics):
    """edge"""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        make = Instruments(registry)
        self.connections = make.gauge(
            "steward_edge_connections", "Open sockets, by kind.", kind=of.SOCKET_KINDS
        )
        self.users = make.gauge("steward_edge_users", "Users with a connection.")
        self.handshakes = make.counter(
            "steward_edge_handshakes_total",
            "Handshakes by result: accepted or the reason.",
            result=of.HANDSHAKE_RESULTS,
        )
        self.closes = make.counter(
            "steward_edge_closes_total", "Connections ended, by close code.", code=of.CLOSE_CODES
        )
        self.slow_consumers = make.counter(
            "steward_edge_slow_consumers_total",
            "Connections ended because their client did not read.",
        )
        self.frames_in = make.counter("steward_edge_frames_received_total", "Client messages.")
        self.events_out = make.counter(
            "steward_edge_events_sent_total", "Events written, counted per connection."
        )
        self.errors = make.counter(
            "steward_edge_errors_total", "Error frames by reason.", reason=of.REASONS
        )
        self.resumes = make.counter(
            "steward_edge_resumes_total",
            "Connections by kind of resume: new, resumed, reset.",
            resume=of.RESUMES,
        )
        self.lost_events = make.counter(
            "steward_edge_lost_events_total",
            "Events that a client was shown and the log has no more. Must stay zero.",
        )
        self.attach_seconds = make.histogram(
            "steward_edge_attach_seconds", "From an accepted upgrade to `ready`.", FAST
        )
        self.first_event_seconds = make.histogram(
            "steward_edge_first_event_seconds",
            "From a message that starts a run at once to its first event in the socket.",
            FAST,
        )
        self.delivery_seconds = make.histogram(
            "steward_edge_delivery_seconds",
            "From a batch off the node's stream to its bytes in the sockets.",
            FAST,
        )
        self.append_to_socket_seconds = make.histogram(
            "steward_edge_append_to_socket_seconds",
            "From the oldest append of a batch, durable, to the batch in the sockets.",
            FAST,
        )
        self.append_to_ack_seconds = make.histogram(
            "steward_edge_append_to_ack_seconds",
            "From a durable append to a client's `ack` of it; a sample of one per batch.",
            FAST,
        )
        self.dropped = make.counter(
            "steward_edge_stale_deliveries_total",
            "Deliveries of a lower epoch that were dropped.",
        )
        self.waiting_commands = make.gauge(
            "steward_edge_waiting_commands", "Commands that wait for their node to read."
        )


class AuthMetrics(ServiceMetrics):
    """auth"""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        make = Instruments(registry)
        self.checks = make.counter(
            "steward_auth_checks_total",
            "Credentials by kind and result.",
            kind=of.CREDENTIALS,
            result=of.CHECK_RESULTS,
        )
        self.check_seconds = make.histogram(
            "steward_auth_check_seconds", "Time to decide one batch of credentials.", FAST
        )


SERVICES: dict[str, type[ServiceMetrics]] = {
    "registry": RegistryMetrics,
    "auth": AuthMetrics,
    "log": LogMetrics,
    "agent": AgentMetrics,
    "edge": EdgeMetrics,
}
