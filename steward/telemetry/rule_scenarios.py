"""What has to happen for each alert that is not about a budget; see `rule_tests`."""

from steward.telemetry.rule_tests import Fires, Scenario

_EDGE = {"instance": "edge-0", "service": "edge"}
_NODE = {"instance": "agent-0", "service": "agent"}


def scenarios() -> list[Scenario]:
    """At every 30 s, evaluated as often."""
    return [*_invariants(), *_availability(), *_slowness(), *_pressure()]


def _labels(**labels: str) -> str:
    return ",".join(f'{name}="{value}"' for name, value in {"job": "steward", **labels}.items())


def _invariants() -> list[Scenario]:
    breach = {"job": "steward", "instance": "edge-1", "kind": "foreign_event"}
    back = {"job": "steward", "instance": "registry-0", "kind": "stream_went_back"}
    seen = f"steward_breaches_total{{{_labels(instance='edge-1', kind='foreign_event')}}}"
    recorded = "steward_registry_violations_total"
    rule = "StewardSsotViolation"
    back_labels = _labels(instance="registry-0", severity="breach", kind="stream_went_back")
    stale = _labels(instance="registry-0", severity="refusal", kind="stale_append")
    lost = f"steward_edge_lost_events_total{{{_labels(**_EDGE)}}}"
    finding = 'steward_registry_census_findings{kind="unreachable_user"}'
    age = "steward_registry_census_age_seconds"
    return [
        Scenario(
            "what the census finds pages when it stays",
            {finding: "0x10 1 0x8 2x20"},
            [
                Fires("6m", "StewardCensusFindings"),
                Fires("12m", "StewardCensusFindings", [{"kind": "unreachable_user"}]),
            ],
        ),
        Scenario(
            "a census that can't ask everybody",
            {age: "3x10 0+30x20"},
            [Fires("5m", "StewardCensusStands"), Fires("12m", "StewardCensusStands", [{}])],
        ),
        Scenario(
            "the first breach ever fires, though its series did not exist before",
            {seen: "_x10 1x60"},
            [Fires("4m", rule), Fires("6m", rule, [breach]), Fires("20m", rule)],
        ),
        Scenario(
            "a breach fires where its series stood at 0",
            {seen: "0x10 1x60"},
            [Fires("4m", rule), Fires("6m", rule, [breach]), Fires("20m", rule)],
        ),
        Scenario(
            "a breach that only the registry has on record fires",
            {f"{recorded}{{{back_labels}}}": "0x10 1x60"},
            [Fires("6m", rule, [{**back, "severity": "page"}])],
        ),
        Scenario(
            "refusals never fire it",
            {
                f"steward_refusals_total{{{_labels(kind='stale_append')}}}": "0+100x60",
                f"{recorded}{{{stale}}}": "_x10 0+100x50",
                seen: "0x60",
            },
            [Fires("20m", rule)],
        ),
        Scenario(
            "acknowledged events that are gone fire",
            {lost: "0x10 7x60"},
            [
                Fires("4m", "StewardAcknowledgedEventsLost"),
                Fires("6m", "StewardAcknowledgedEventsLost", [{"job": "steward", **_EDGE}]),
            ],
        ),
    ]


def _availability() -> list[Scenario]:
    handshakes = "steward_edge_handshakes_total"
    checks = "steward_auth_checks_total"
    fences = "steward_registry_fences_total"
    missing = [
        Scenario(
            f"{service} without a live process is missed",
            {
                f"up{{{_labels(service=service, instance='one')}}}": "1x10 0x30",
                f"up{{{_labels(service='other', instance='two')}}}": "1x40",
            },
            [
                Fires("4m", f"Steward{service.capitalize()}Absent"),
                Fires("8m", f"Steward{service.capitalize()}Absent", [{}]),
                Fires("4m", "StewardTargetDown"),
                Fires(
                    "12m",
                    "StewardTargetDown",
                    [{"job": "steward", "service": service, "instance": "one"}],
                ),
            ],
        )
        for service in ("registry", "auth", "log", "agent", "edge")
    ]
    return [
        *missing,
        Scenario(
            "no node up",
            {
                'steward_registry_nodes{state="up"}': "3x10 0x10",
                'steward_registry_nodes{state="away"}': "0x10 3x10",
            },
            [Fires("4m", "StewardNoNodeUp"), Fires("7m", "StewardNoNodeUp", [{}])],
        ),
        Scenario(
            "handshakes that fail on our side page, those that fail on the client's side do not",
            {
                f'{handshakes}{{result="accepted"}}': "0+90x40",
                f'{handshakes}{{result="TOKEN_EXPIRED"}}': "0+90x40",
                f'{handshakes}{{result="NO_CAPACITY"}}': "0x20 0+30x20",
            },
            [Fires("9m", "StewardHandshakesFail"), Fires("19m", "StewardHandshakesFail", [{}])],
        ),
        Scenario(
            "a store that auth can't reach",
            {
                f'{checks}{{result="ok"}}': "0+10x40",
                f'{checks}{{result="STORE_UNAVAILABLE"}}': "0x10 0+1x30",
            },
            [
                Fires("4m", "StewardAuthStoreUnavailable"),
                Fires("12m", "StewardAuthStoreUnavailable", [{}]),
            ],
        ),
        Scenario(
            "one fenced node is a node that died, many are a reason to look",
            {f'{fences}{{evidence="A"}}': "0x10 1x10 2x10 6x20"},
            [Fires("15m", "StewardNodesFenced"), Fires("18m", "StewardNodesFenced", [{}])],
        ),
        Scenario(
            "a rollout that got stuck",
            {
                'steward_build_info{version="1",instance="a"}': "1x300",
                'steward_build_info{version="2",instance="b"}': "_x10 1x290",
            },
            [Fires("1h", "StewardVersionsMixed"), Fires("2h10m", "StewardVersionsMixed", [{}])],
        ),
    ]


def _slow(alert: str, histogram: str, bound: str, labels: dict[str, str], late: str) -> Scenario:
    """Ten observations a step: within the bound at first, from 5 min on above it."""
    where = "".join(f',{name}="{value}"' for name, value in labels.items())
    above = {
        f'{histogram}_bucket{{le="{bound}"{where}}}': "0+10x10 100x80",
        f'{histogram}_bucket{{le="5.0"{where}}}': "0+10x90",
        f'{histogram}_bucket{{le="+Inf"{where}}}': "0+10x90",
    }
    name = f"{alert}: late by what counts, for long enough"
    return Scenario(name, above, [Fires("5m", alert), Fires(late, alert, [labels])])


def _slowness() -> list[Scenario]:
    node, edge = {"instance": "agent-0"}, {"instance": "edge-0"}
    return [
        _slow("StewardAppendsSlow", "steward_agent_append_seconds", "0.25", {}, "20m"),
        _slow("StewardDeliverySlow", "steward_edge_delivery_seconds", "0.1", edge, "20m"),
        _slow("StewardLoopLag", "steward_loop_lag_seconds", "0.25", _EDGE, "20m"),
        _slow("StewardAgentCodeBlocks", "steward_agent_loop_lag_seconds", "0.5", node, "20m"),
        _slow("StewardGcPauses", "steward_gc_pause_seconds", "0.1", _EDGE, "30m"),
    ]


def _pressure() -> list[Scenario]:
    node = {"instance": "agent-0"}
    return [
        Scenario(
            "clients that don't read",
            {
                'steward_edge_connections{kind="websocket"}': "100x40",
                "steward_edge_slow_consumers_total": "0x10 0+1x30",
            },
            [Fires("5m", "StewardSlowConsumers"), Fires("19m", "StewardSlowConsumers", [{}])],
        ),
        Scenario(
            "an edge that does not read",
            {'steward_agent_slow_edges_total{instance="agent-0"}': "0x10 1x30"},
            [Fires("4m", "StewardEdgesDoNotRead"), Fires("8m", "StewardEdgesDoNotRead", [node])],
        ),
        Scenario(
            "work that piles up",
            {
                f"steward_agent_waiting_appends{{{_labels(**_NODE)}}}": "10x10 6000x20",
                f"steward_edge_waiting_commands{{{_labels(**_EDGE)}}}": "4000x30",
            },
            [Fires("5m", "StewardQueuesGrow"), Fires("9m", "StewardQueuesGrow", [_NODE])],
        ),
        Scenario(
            "runs whose code does not end",
            {'steward_agent_abandoned_runs_total{instance="agent-0"}': "0x10 2x30"},
            [Fires("4m", "StewardRunsAbandoned"), Fires("8m", "StewardRunsAbandoned", [node])],
        ),
        Scenario(
            "hardly any file descriptor left",
            {
                f"process_open_fds{{{_labels(**_EDGE)}}}": "100x10 900x20",
                f"process_max_fds{{{_labels(**_EDGE)}}}": "1000x30",
            },
            [
                Fires("5m", "StewardFileDescriptors"),
                Fires("14m", "StewardFileDescriptors", [_EDGE]),
            ],
        ),
    ]
