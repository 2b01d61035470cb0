"""One trace joins the services: who came, where the manager is, what the agent did, who heard."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from steward.testing.collector import SeenSpan, SpanCollector, span_collector
from steward.testing.local_cluster import LocalCluster
from steward.testing.tab import open_tab
from steward.testing.waiting import wait_for

# Child span -> the span whose child it is, each as (service, name). The five golden events
# are delivered under the message's context, which is a child of edge.receive.
EDGES = {
    ("steward-registry", "registry.resolve"): ("steward-edge", "edge.connect"),
    ("steward-agent", "manager.activate"): ("steward-edge", "edge.connect"),
    ("steward-agent", "manager.accept"): ("steward-edge", "edge.receive"),
    ("steward-agent", "invoke_agent demo"): ("steward-edge", "edge.receive"),
    ("steward-agent", "execute_tool query_sales"): ("steward-agent", "invoke_agent demo"),
    ("steward-edge", "edge.deliver"): ("steward-edge", "edge.receive"),
}


def edges_of(spans: list[SeenSpan]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    by_id = {(span.trace_id, span.span_id): span for span in spans}
    found = set()
    for span in spans:
        parent = by_id.get((span.trace_id, span.parent_id))
        if parent is not None:
            found.add(((span.service, span.name), (parent.service, parent.name)))
    return found


async def ask_once(cluster: LocalCluster) -> dict[str, Any]:
    token = await asyncio.to_thread(cluster.token, "alice")
    async with aiohttp.ClientSession() as session:
        async with await open_tab(session, cluster.url, token) as tab:
            await tab.ask("m1", "Which region sold the most?", 10)
            return tab.events[-1]


def start_traced(start_cluster: Any, endpoint: str) -> LocalCluster:
    names = ("REGISTRY", "AUTH", "LOG", "AGENT", "EDGE")
    environ = {f"STEWARD_{name}_OTLP_ENDPOINT": endpoint for name in names}
    cluster: LocalCluster = start_cluster(environ=environ).wait_ready()
    return cluster


def test_a_trace_joins_edge_registry_manager_run_tool_and_delivery(
    start_cluster: Any, tmp_path: Path
) -> None:
    with span_collector() as (collector, endpoint):
        cluster = start_traced(start_cluster, endpoint)
        last = asyncio.run(ask_once(cluster))

        def complete(collector: SpanCollector = collector) -> bool:
            return set(EDGES.items()) <= edges_of(collector.spans())

        try:
            wait_for(complete, 15, "every expected edge between spans")
        except TimeoutError:
            missing = set(EDGES.items()) - edges_of(collector.spans())
            pytest.fail(f"edges not seen: {missing}; seen: {collector.spans()}")
        trace_id = last["trace"].split("-")[1]
        services = {span.service for span in collector.spans() if span.trace_id == trace_id}
        assert {"steward-edge", "steward-agent"} <= services
        assert last["trace"].endswith("-01")


def test_without_an_endpoint_no_event_is_marked_as_sampled(cluster: LocalCluster) -> None:
    assert asyncio.run(ask_once(cluster))["trace"].endswith("-00")
