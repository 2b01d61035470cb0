"""A real Prometheus watches a real cluster: every expression that we ship says something.

The cluster is put under some load, a client acknowledges, one comes back, one does not read, a
user is moved and a node is killed. Then each expression of dashboards and rules is asked.
"""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from steward.telemetry.alerts import alerts
from steward.telemetry.boards import boards
from steward.telemetry.catalog import SERVICES
from steward.telemetry.dashboard import expressions
from steward.telemetry.inventory import metric_rows
from steward.telemetry.slos import recordings
from steward.testing.collector import span_collector
from steward.testing.local_cluster import LocalCluster, free_ports, is_ready
from steward.testing.prometheus import Prometheus, missing
from steward.testing.tab import Tab, open_tab, resume_tab
from steward.testing.waiting import eventually, wait_for

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/observability"
AGENTS = ["--agent", "steward.load.agent:load"]
ROLES = ("REGISTRY", "AUTH", "LOG", "AGENT", "EDGE")
WINDOW = "3m"
PEOPLE = ("private-alice", "private-bob", "private-carol")
FAMILIES = {row.name: row for row in metric_rows()}
# Labels that are no label of a metric but of its samples, or of where they were scraped.
OF_SAMPLES = {"le"}

EMPTY: dict[str, str] = {}
"""Expressions that may give nothing here, each with the reason."""

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(missing()), reason=missing() or "none"),
]


@dataclass
class Watched:
    """What all tests of this module look at."""

    cluster: LocalCluster
    prometheus: Prometheus
    traces: set[str]
    pages: dict[str, str]
    began: float


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("observed")
    prometheus = None
    with span_collector() as (collector, endpoint):
        environ = {f"STEWARD_{role}_OTLP_ENDPOINT": endpoint for role in ROLES}
        environ |= {f"STEWARD_{role}_TRACE_RATIO": "1" for role in ROLES}
        environ |= {"STEWARD_EDGE_MAX_WRITE_BUFFER_BYTES": "65536"}
        cluster = LocalCluster.start(directory, "--agents", "3", *AGENTS, environ=environ)
        try:
            cluster.wait_ready()
            began = time.time()
            prometheus = Prometheus.start(directory / "prometheus", RULES)
            prometheus.scrape(cluster.processes.values())
            wait_for(lambda: all_up(prometheus, cluster), 20, "every process is scraped")
            asyncio.run(live(cluster))
            alive = [name for name in cluster.processes if is_ready(cluster.processes[name]["ops"])]
            pages = {name: cluster.metrics(name) for name in alive}
            wait_for(lambda: not lacking(prometheus), 40, "all of it is in Prometheus")
            traces = {span.trace_id for span in collector.spans()}
            yield Watched(cluster, prometheus, traces, pages, began)
        except BaseException:
            print(cluster.logs())
            raise
        finally:
            if prometheus is not None:
                prometheus.end()
            cluster.end()


def all_up(prometheus: Prometheus, cluster: LocalCluster) -> bool:
    healthy = {t["labels"]["instance"] for t in prometheus.targets() if t["health"] == "up"}
    return healthy == set(cluster.processes)


async def live(cluster: LocalCluster) -> None:
    """All that leaves something in a metric."""
    tokens = [await asyncio.to_thread(cluster.token, user) for user in PEOPLE]
    loading = asyncio.create_task(
        asyncio.to_thread(
            cluster.steward, "load", "--users", "4", "--seconds", "3", "--rate", "100"
        )
    )
    silent = reads_nothing(cluster.urls[0], tokens[2])
    async with aiohttp.ClientSession() as session:
        alice = await open_tab(session, cluster.url, tokens[0])
        await says(alice, "one", "2 40 0", acknowledges=True)
        bob = await open_tab(session, cluster.url, tokens[1])
        await says(bob, "two", "0.2 40 0")
        bob.drop()
        bob = await resume_tab(session, cluster.url, tokens[1], bob)
        await asyncio.to_thread(cluster.steward, "move", PEOPLE[0])
        await alice.until("manager_moved", 20)
        carol = await open_tab(session, cluster.url, tokens[2])
        await carol.send("three", "15 3000 0")
        await loading
        ended = "steward_edge_slow_consumers_total"
        await eventually(lambda: cluster.metric(ended) > 0, "a slow consumer is ended", 30)
        silent.close()
        node = bob.ready["manager"]["node_id"]
        await asyncio.to_thread(cluster.kill, node, signal.SIGKILL)
        await bob.until("manager_moved", 20)
        await says(bob, "four", "0.2 40 0")
        for tab in (alice, bob, carol):
            await tab.close()


async def says(tab: Tab, id: str, text: str, *, acknowledges: bool = False) -> None:
    """A message, and all of its run; each event is acknowledged when it came."""
    await tab.send(id, text)
    while True:
        event = await tab.read(20)
        if acknowledges and "sequence" in event:
            frame = {"type": "ack", "sequence": event["sequence"]}
            await tab.socket.send_str(json.dumps(frame))
        if event["type"] == "agent_completed":
            return


def reads_nothing(url: str, token: str) -> socket.socket:
    """A WebSocket of this user that never reads, with a small buffer."""
    port = int(url.rpartition(":")[2])
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect(("127.0.0.1", port))
    made.sendall(
        (
            f"GET /v1/connect HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: Bearer {token}\r\n\r\n"
        ).encode()
    )
    return made


def asked(expression: str) -> str:
    """As Grafana would ask it."""
    return expression.replace("$__rate_interval", WINDOW).replace("$instance", ".*")


def says_something(prometheus: Prometheus, expression: str) -> bool:
    """Whether there is a series with a number; NaN is what 0 / 0 gives."""
    return any(series["value"][1] != "NaN" for series in prometheus.query(asked(expression)))


def judged(expression: str) -> str:
    """An alert's expression with its comparisons as values, so that a quiet one shows too.

    `absent` gives nothing while the thing is there: what it looks at is asked instead.
    """
    inner = re.sub(r"^absent\((.*)\)$", r"\1", expression)
    return re.sub(r" (>=|>|==) ", r" \1 bool ", inner)


def lacking(prometheus: Prometheus) -> list[str]:
    """The expressions that say nothing, but for those of the list."""
    shown = [e for board in boards().values() for e in expressions(board)]
    shown += [f'{one.record}{{{one.label}="{one.value}"}}' for one in recordings()]
    shown += [one.expression for one in recordings()]
    shown += [judged(alert.expression) for alert in alerts()]
    return [e for e in dict.fromkeys(shown) if e not in EMPTY and not says_something(prometheus, e)]


def test_every_expression_of_dashboards_and_rules_says_something(watched: Watched) -> None:
    assert lacking(watched.prometheus) == []


def test_what_is_on_the_list_of_empty_ones_is_shipped_and_really_empty(watched: Watched) -> None:
    shown = {e for board in boards().values() for e in expressions(board)}
    assert set(EMPTY) <= shown
    for expression, reason in EMPTY.items():
        assert reason.endswith(".") and not says_something(watched.prometheus, expression)


def test_every_rule_is_healthy_and_none_pages_for_what_must_be_zero(watched: Watched) -> None:
    rules = watched.prometheus.rules()
    names = [alert.name for alert in alerts()] + [one.record for one in recordings()]
    assert sorted(rule["name"] for rule in rules) == sorted(names)
    assert [rule for rule in rules if rule["health"] != "ok" or rule.get("lastError")] == []
    firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
    assert not firing & {"StewardSsotViolation", "StewardAcknowledgedEventsLost"}


def test_what_was_done_is_counted_in_the_process_where_it_happened(watched: Watched) -> None:
    def grew(name: str, **labels: str) -> float:
        matchers = ",".join(f'{label}="{value}"' for label, value in labels.items())
        found = watched.prometheus.query(f"sum(max_over_time({name}{{{matchers}}}[{WINDOW}]))")
        return float(found[0]["value"][1])

    assert grew("steward_edge_slow_consumers_total", service="edge") >= 1
    assert grew("steward_edge_resumes_total", service="edge", resume="resumed") >= 1
    assert grew("steward_edge_append_to_ack_seconds_count", service="edge") >= 10
    assert grew("steward_edge_append_to_socket_seconds_count", service="edge") >= 50
    assert grew("steward_edge_first_event_seconds_count", service="edge") >= 3
    assert grew("steward_agent_failover_gap_seconds_count", service="agent") >= 1
    assert grew("steward_agent_handoff_gap_seconds_count", service="agent") >= 1
    assert grew("steward_registry_fences_total", service="registry") >= 1
    assert grew("steward_breaches_total") == 0
    assert grew("steward_edge_lost_events_total") == 0
    # The registry collects seldom: of it there is only the series.
    assert grew("steward_gc_pause_seconds_count") > 0
    for service in SERVICES:
        assert grew("steward_gc_pause_seconds_count", service=service) >= 0, service
        assert grew("steward_loop_lag_seconds_count", service=service) > 10, service


def test_an_event_is_in_the_socket_after_it_is_durable_and_before_it_is_acknowledged(
    watched: Watched,
) -> None:
    def mean(name: str) -> float:
        query = f"sum({name}_sum) / sum({name}_count)"
        return float(watched.prometheus.query(query)[0]["value"][1])

    inside = mean("steward_edge_delivery_seconds")
    to_socket = mean("steward_edge_append_to_socket_seconds")
    assert 0 < inside < to_socket < 1
    assert 0 < mean("steward_edge_append_to_ack_seconds") < 5


def test_latencies_carry_the_ids_of_sampled_traces(watched: Watched) -> None:
    for name in (
        "steward_edge_append_to_socket_seconds",
        "steward_edge_append_to_ack_seconds",
        "steward_edge_first_event_seconds",
        "steward_edge_attach_seconds",
        "steward_agent_append_seconds",
        "steward_agent_activate_seconds",
        "steward_registry_resolve_seconds",
    ):
        found = watched.prometheus.exemplars(f"{name}_bucket", watched.began, time.time())
        ids = {one["labels"]["trace_id"] for series in found for one in series["exemplars"]}
        assert ids, name
        assert ids & watched.traces, f"{name}: no trace that was exported"


def test_a_scrape_has_the_labels_of_the_catalog_and_nobodys_name(watched: Watched) -> None:
    sample = re.compile(r"^([a-z_]+)(?:\{(.*)\})? ")
    for process, page in watched.pages.items():
        for person in PEOPLE:
            assert person not in page, process
        for line in page.splitlines():
            if line.startswith("#"):
                continue
            found = sample.match(line)
            assert found is not None, line
            name = re.sub(r"_(bucket|sum|count)$", "", found[1])
            labels = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
            row = FAMILIES[name]
            assert set(labels) - OF_SAMPLES == set(row.labels), line
            values = row.values
            assert not values or tuple(labels[label] for label in row.labels) in values, line


def test_make_observe_watches_a_running_cluster_until_it_is_told_to_stop(
    watched: Watched,
) -> None:
    port = free_ports(1)
    command = [sys.executable, "-m", "steward.testing.observe", "--port", str(port)]
    observing = subprocess.Popen(
        [*command, "--data", str(watched.cluster.data)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert observing.stdout is not None
        assert observing.stdout.readline().strip() == f"http://127.0.0.1:{port}/targets"

        def scraped() -> set[str]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/targets") as answer:
                targets: list[dict[str, Any]] = json.load(answer)["data"]["activeTargets"]
            return {t["labels"]["instance"] for t in targets if t["health"] == "up"}

        # The node that was killed may not be back yet.
        wait_for(lambda: scraped() >= set(watched.pages), 40, "all are scraped")
        observing.send_signal(signal.SIGINT)
        assert observing.wait(20) == 0
    finally:
        observing.kill()
        observing.communicate()
