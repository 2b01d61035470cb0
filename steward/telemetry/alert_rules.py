"""Alerts on what must never be, and on what is away: when each fires, and what to do.

Each pages or warns for something that a person can act on. The steps are its section of
docs/runbooks.md, so an alert without steps can't be written.
"""

from steward.telemetry.alert import Alert
from steward.telemetry.catalog import SERVICES
from steward.telemetry.promql import JOB, grew, increase, rate, series


def invariant_alerts() -> list[Alert]:
    """What must never be. A refusal is a guard that worked, and is none of it."""
    seen = series("steward_breaches_total")
    recorded = series("steward_registry_violations_total", severity="breach")
    return [
        Alert(
            "StewardSsotViolation",
            f"{grew(seen)} or {grew(recorded)}",
            "0m",
            "page",
            "A breach, {{ $labels.kind }}, was seen or recorded by {{ $labels.instance }}",
            "Perhaps nothing yet; what the system guarantees does not hold for somebody.",
            (
                "Run `steward violations --breaches` for the evidence, keep the stores as they "
                "are, and go by the breach's row in docs/violations.md.",
                "Find out who is concerned: `steward where USER` for each user of the evidence.",
                "Restart nothing before the stores and the logs of all processes are copied.",
            ),
        ),
        Alert(
            "StewardAcknowledgedEventsLost",
            grew(series("steward_edge_lost_events_total")),
            "0m",
            "page",
            "Events that clients were shown are gone from the log, says {{ $labels.instance }}",
            "Clients start their stream anew and miss what they had already seen.",
            (
                "Stop the log and keep its files: it lost what it had acknowledged.",
                "Look for a volume that was restored or replaced, and for a disk that lies about "
                "flushes; compare `steward_log_events_total` before and after.",
                "Go by `stream_went_back` in docs/violations.md.",
            ),
        ),
        Alert(
            "StewardCensusFindings",
            f"max by (kind) ({series('steward_registry_census_findings')}) > 0",
            "30s",
            "page",
            "The census finds {{ $labels.kind }}: who holds and who is told do not agree",
            "Users of the finding may wait for a manager, or be attached to one that is over.",
            (
                "Run `steward compliance` for the findings with their evidence.",
                "`steward where USER` says who owns a user of the evidence; compare with the node "
                "that holds it.",
                "A finding that goes by itself was a move that took long: look at the load.",
            ),
        ),
        Alert(
            "StewardCensusStands",
            f"max({series('steward_registry_census_age_seconds')}) > 60",
            "1m",
            "warning",
            "No census could ask everybody for a minute",
            "None; what it would find is not seen.",
            (
                "Look in the registry's log for the node, edge or log that does not answer.",
                "With `registry.census_ms` 0 there is none unless asked: silence this alert.",
            ),
        ),
    ]


_ABSENT = {
    "registry": (
        "Connected users go on; new ones get no manager, and no dead node is replaced.",
        "Start it; one process per store, or several that elect one.",
    ),
    "auth": (
        "Open connections go on until their token ends; new ones are refused.",
        "Start it, and look at its store when it does not stay.",
    ),
    "log": (
        "Nothing can be appended: all runs wait, and messages are not accepted.",
        "Start it on its volume; never on an empty one.",
    ),
    "agent": ("No manager can live: nobody gets an answer.", "Start agent nodes."),
    "edge": ("Nobody can connect.", "Start edges, and look at what is in front of them."),
}


def availability_alerts() -> list[Alert]:
    """Somebody is away, or refuses."""
    nodes_up = series("steward_registry_nodes", state="up")
    no_store = rate("steward_auth_checks_total", result="STORE_UNAVAILABLE")
    handshakes = "steward_edge_handshakes_total"
    refused = rate(handshakes, result="MANAGER_UNAVAILABLE|NO_CAPACITY|INTERNAL")
    return [
        *(
            Alert(
                f"Steward{service.capitalize()}Absent",
                f'absent(up{{job="{JOB}",service="{service}"}} == 1)',
                "1m",
                "page",
                f"No {service} process answers",
                _ABSENT[service][0],
                (
                    _ABSENT[service][1],
                    "`steward status` says which processes it reaches and what they wait for; "
                    "`/readyz` on the ops port of each says the same of one.",
                    "If they run and only the scrape fails, look at the network of Prometheus.",
                ),
            )
            for service in SERVICES
        ),
        Alert(
            "StewardTargetDown",
            f'up{{job="{JOB}"}} == 0',
            "5m",
            "warning",
            "{{ $labels.instance }} ({{ $labels.service }}) is not scraped",
            "None as long as the others of its kind carry the load.",
            (
                "Look whether the process runs; its log ends with why it ended.",
                "Exit code 1 means fenced or a broken store, 2 a machine or settings that it "
                "can't use: `steward doctor` checks these.",
            ),
        ),
        Alert(
            "StewardNoNodeUp",
            f"sum({nodes_up}) == 0",
            "30s",
            "page",
            "The registry sees no agent node: nobody gets a manager",
            "Messages are not answered; connections stay open and wait.",
            (
                "Look at the agent nodes' `/readyz` on the ops port: it says what they wait for.",
                "Split `steward_registry_nodes` by state: `away` are those whose stream is gone, "
                "`draining` those that were told to go.",
            ),
        ),
        Alert(
            "StewardHandshakesFail",
            f"{refused} / {rate(handshakes)} > 0.05",
            "5m",
            "page",
            "More than 5 % of the handshakes fail for a reason on our side",
            "Clients connect again with backoff, and some never get in.",
            (
                "Split `steward_edge_handshakes_total` by `result`; NO_CAPACITY wants more edges "
                "or nodes, MANAGER_UNAVAILABLE a look at registry and nodes.",
                "INTERNAL is an error of an edge: its log has the trace id.",
            ),
        ),
        Alert(
            "StewardAuthStoreUnavailable",
            f"{no_store} > 0",
            "2m",
            "page",
            "Auth can't reach its store: tickets and logins are refused",
            "New browsers can't log in; tokens are still checked.",
            (
                "Look at the disk of auth, or at its database, and at its log.",
                "Check the store's address and password with `steward doctor`.",
            ),
        ),
        Alert(
            "StewardNodesFenced",
            f"{increase('steward_registry_fences_total', '15m')} > 3",
            "0m",
            "warning",
            "More than three node incarnations were fenced within 15 minutes",
            "Users of these nodes waited for a failover; open runs were interrupted.",
            (
                "Split by `evidence`: C and D without A or B mean lost beats, so load or network.",
                "A and B are processes that died: their logs say of what.",
                "Look at `steward_loop_lag_seconds` of the nodes before they were fenced.",
            ),
        ),
        Alert(
            "StewardVersionsMixed",
            "count(count by (version) (steward_build_info)) > 1",
            "2h",
            "warning",
            "Processes of more than one version have run side by side for two hours",
            "None: versions that follow each other work together. A rollout got stuck.",
            (
                "`steward status` shows the versions; finish the rollout or take it back.",
                "Look for a pod that does not drain: `steward drain NODE`.",
            ),
        ),
    ]
