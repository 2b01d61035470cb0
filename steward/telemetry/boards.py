"""The dashboards: overview, edge, registry, agents, one run's life, objectives.

What matters is on top of each; below is every metric of the catalog, on the board of its service,
so that nothing that is exported can be missing from all of them.
"""

from steward.telemetry.dashboard import (
    PROCESS,
    WINDOW,
    Board,
    Panel,
    Query,
    of_metric,
    quantiles,
    render,
)
from steward.telemetry.inventory import EVERY_SERVICE, metric_rows
from steward.telemetry.promql import JOB, increase, quantile, rate, series, total
from steward.telemetry.slos import BUDGET, RATIO, SLI_P50, SLI_P99, SLIS, SLOS

FOLDER = "deploy/observability/dashboards"


def render_boards() -> dict[str, str]:
    """Path below the repository's root → JSON."""
    return {f"{FOLDER}/{name}.json": render(board) for name, board in boards().items()}


def boards() -> dict[str, Board]:
    """All of them, by the name of their file."""
    return {
        "overview": _overview(),
        "edge": _edge(),
        "registry": _registry(),
        "agents": _agents(),
        "run": _run(),
        "slos": _slos(),
    }


def _number(title: str, expression: str, unit: str = "short", worst: float | None = None) -> Panel:
    return Panel(title, [Query(expression)], unit, stat=True, worst=worst)


def _of(service: str) -> list[Panel]:
    """A panel for each metric of this service."""
    return [of_metric(row) for row in metric_rows() if row.service == service]


def _split(title: str, name: str, label: str, help: str = "") -> Panel:
    """A counter as rates, by one label."""
    return Panel(title, [Query(rate(name, WINDOW, label), f"{{{{{label}}}}}")], help=help)


def _latency(title: str, name: str, help: str = "") -> Panel:
    return Panel(title, quantiles(name), "s", help)


def _overview() -> Board:
    numbers = [
        _number("Breaches", total("steward_breaches_total"), worst=1),
        _number("Acknowledged events lost", total("steward_edge_lost_events_total"), worst=1),
        _number("Connections", total("steward_edge_connections")),
        _number("Managers", total("steward_agent_managers")),
        _number("Open runs", total("steward_agent_open_runs")),
        _number("Nodes up", total("steward_registry_nodes", state="up")),
        _number("Durable events/s", rate("steward_log_events_total", WINDOW)),
        _number("Events sent/s", rate("steward_edge_events_sent_total", WINDOW)),
        _number("Client messages/s", rate("steward_edge_frames_received_total", WINDOW)),
        _number(
            "Append p99", quantile(0.99, "steward_agent_append_seconds", window=WINDOW), "s", 0.25
        ),
        _number(
            "Append to socket p99",
            quantile(0.99, "steward_edge_append_to_socket_seconds", window=WINDOW),
            "s",
            0.1,
        ),
        _number("Nodes fenced in 1 h", increase("steward_registry_fences_total", "1h"), worst=3),
    ]
    processes = [
        Panel(
            "Processes that answer",
            [Query(f'sum by (service) (up{{job="{JOB}"}})', "{{service}}")],
            help="By service; one that is not scraped counts as 0.",
        ),
        _split("Resolves by result", "steward_registry_resolves_total", "result"),
        _split("Refusals", "steward_refusals_total", "kind", "Guards that worked."),
        Panel(
            "Versions",
            [Query("count by (version) (steward_build_info)", "{{version}}")],
            help="Processes by the version that they run.",
        ),
    ]
    everywhere = _of(EVERY_SERVICE)
    return Board(
        "steward-overview",
        "Steward / overview",
        "Is it well, how much does it do, and what do its processes need?",
        {"Now": numbers, "Traffic": processes, "Every process": everywhere},
    )


def _edge() -> Board:
    slow = "steward_edge_slow_consumers_total"
    numbers = [
        _number("WebSockets", total("steward_edge_connections", kind="websocket")),
        _number("Event streams", total("steward_edge_connections", kind="sse")),
        _number("Users", total("steward_edge_users")),
        _number("Handshakes/s", rate("steward_edge_handshakes_total", WINDOW)),
        _number("Slow consumers in 10 min", increase(slow, "10m"), worst=10),
        _number("Resets in 10 min", increase("steward_edge_resumes_total", "10m", resume="reset")),
    ]
    sight = [
        _latency("Attach", "steward_edge_attach_seconds"),
        _latency("First event", "steward_edge_first_event_seconds"),
        _latency("Append to socket", "steward_edge_append_to_socket_seconds"),
        _latency(
            "Append to ack",
            "steward_edge_append_to_ack_seconds",
            "Only of clients that send `ack`.",
        ),
        _split("Resumes", "steward_edge_resumes_total", "resume"),
        _split("Connections ended", "steward_edge_closes_total", "code"),
    ]
    return Board(
        "steward-edge",
        "Steward / edge",
        "Sockets, who comes and goes, and how fast events reach them; auth behind it.",
        {"Now": numbers, "What users see": sight, "Edge": _of("edge"), "Auth": _of("auth")},
    )


def _registry() -> Board:
    nodes = series("steward_registry_nodes")
    numbers = [
        _number("Placements", total("steward_registry_placements")),
        _number("Nodes up", total("steward_registry_nodes", state="up")),
        _number("Nodes away", total("steward_registry_nodes", state="away"), worst=1),
        _number("Nodes draining", total("steward_registry_nodes", state="draining")),
        _number("Edges", total("steward_registry_edges")),
        _number(
            "Breaches recorded",
            total("steward_registry_violations_total", severity="breach"),
            worst=1,
        ),
    ]
    ownership = [
        Panel(
            "Census",
            [Query(f"sum by (kind) ({series('steward_registry_census_findings')})", "{{kind}}")],
            help="Who holds and who is attached, compared all the time. Must be zero.",
        ),
        Panel("Nodes by state", [Query(f"sum by (state) ({nodes})", "{{state}}")]),
        _split(
            "Nodes fenced",
            "steward_registry_fences_total",
            "evidence",
            "A proof, B broken and refused, C missed beats, D lease over, E operator.",
        ),
        _split("Violations recorded", "steward_registry_violations_total", "kind"),
        _latency("Failover gap", "steward_agent_failover_gap_seconds"),
        _latency("Handoff gap", "steward_agent_handoff_gap_seconds"),
        _latency("Resolve", "steward_registry_resolve_seconds"),
    ]
    return Board(
        "steward-registry",
        "Steward / registry",
        "Who owns whom, and how that changes.",
        {"Now": numbers, "Ownership": ownership, "Registry": _of("registry")},
    )


def _agents() -> Board:
    numbers = [
        _number("Managers", total("steward_agent_managers")),
        _number("Open runs", total("steward_agent_open_runs")),
        _number("Queued runs", total("steward_agent_queued_runs")),
        _number("Runs/s", rate("steward_agent_runs_total", WINDOW)),
        _number("Failed/s", rate("steward_agent_runs_total", WINDOW, outcome="failed")),
        _number("Durable events/s", rate("steward_log_events_total", WINDOW)),
    ]
    queues = [
        ("steward_agent_waiting_appends", "appends {{instance}}"),
        ("steward_agent_outbox_items", "outbox {{instance}}"),
        ("steward_agent_queued_runs", "runs {{instance}}"),
        ("steward_log_waiting_operations", "log {{instance}}"),
    ]
    work = [
        _split("Events by type", "steward_agent_events_total", "type"),
        _split("Runs by outcome", "steward_agent_runs_total", "outcome"),
        Panel(
            "Queues",
            [
                Query(f"sum by (instance) ({series(name, instance=PROCESS)})", legend)
                for name, legend in queues
            ],
            help="What waits: for the log, for edges, for its turn, for a group commit.",
        ),
    ]
    return Board(
        "steward-agents",
        "Steward / agents",
        "Managers, runs, and the log that they write to.",
        {"Now": numbers, "Work": work, "Agent nodes": _of("agent"), "Log": _of("log")},
    )


def _run() -> Board:
    """The stages of a run in the order in which a message goes through them."""
    arrival = [
        _split("Handshakes", "steward_edge_handshakes_total", "result"),
        _latency("Credentials checked", "steward_auth_check_seconds"),
        _latency("Resolve: where is my manager?", "steward_registry_resolve_seconds"),
        _latency("A manager begins", "steward_agent_activate_seconds"),
        _latency("Ready", "steward_edge_attach_seconds"),
        Panel("Messages", [Query(rate("steward_edge_frames_received_total", WINDOW), "in")]),
    ]
    events = [
        _latency(
            "First event of the run",
            "steward_edge_first_event_seconds",
            "From the message to the run's first event in the socket.",
        ),
        *(
            Panel(
                type,
                [Query(rate("steward_agent_events_total", WINDOW, type=type), "events/s")],
                help=help,
            )
            for type, help in (
                ("agent_started", "The run has begun."),
                ("agent_thinking", "What the agent says that it does."),
                ("tool_executing", "A tool was called."),
                ("tool_completed", "A tool has come back."),
                ("agent_completed", "The run is over."),
            )
        ),
    ]
    way = [
        _latency("Append, as the node sees it", "steward_agent_append_seconds"),
        _latency("Group commit of the log", "steward_log_commit_seconds"),
        _latency("Append to socket", "steward_edge_append_to_socket_seconds"),
        _latency("Of that inside of the edge", "steward_edge_delivery_seconds"),
        _latency("Append to ack", "steward_edge_append_to_ack_seconds"),
        _split("Runs ended", "steward_agent_runs_total", "outcome"),
    ]
    return Board(
        "steward-run",
        "Steward / one run's life",
        "Every stage of a run, in order. Dots are traces: each has the id of one that was sampled.",
        {"Arrival": arrival, "The five events": events, "The way of an event": way},
    )


def _slos() -> Board:
    rows: dict[str, list[Panel]] = {
        "Must be zero": [
            _number("Breaches", total("steward_breaches_total"), worst=1),
            _number("Acknowledged events lost", total("steward_edge_lost_events_total"), worst=1),
        ],
        "Latencies": [
            Panel(
                sli,
                [
                    Query(f'{SLI_P50}{{sli="{sli}"}}', "p50"),
                    Query(f'{SLI_P99}{{sli="{sli}"}}', "p99"),
                ],
                "s",
            )
            for sli in SLIS
        ],
    }
    for slo in SLOS:
        label = f'{{slo="{slo.name}"}}'
        rows[f"{slo.target:.3%}".rstrip("0%").rstrip(".") + f" % {slo.promise}"] = [
            Panel(
                "Budget left, 3 days",
                [Query(f"1 - {RATIO}3d{label} / on (slo) {BUDGET}{label}")],
                "percentunit",
                stat=True,
            ),
            Panel(
                "Burn rate",
                [
                    Query(f"{RATIO}{window}{label} / on (slo) {BUDGET}{label}", window)
                    for window in ("5m", "1h", "6h", "3d")
                ],
                help="1 spends exactly the budget; 14.4 over an hour pages.",
            ),
        ]
    return Board(
        "steward-slos",
        "Steward / objectives",
        "What is promised, how it is, and how much may still go wrong.",
        rows,
    )
