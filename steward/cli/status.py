"""`steward status`: the processes of a running cluster, and its nodes as the registry has them.

Processes are those of `cluster.json`, each asked on its ops port whether it is ready, an
edge also for its open connections. Refusals and breaches are those ever recorded.
Exit code 0 when all are ready and the registry answers, else 1.
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from steward.cli.cluster_file import ProcessEntry, read_cluster
from steward.cli.operating import add_cluster, finish
from steward.cli.probe import Readiness, metric_sums, readiness


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "status",
        help="show the processes and nodes of a running cluster",
        description="Show the processes and nodes of a running cluster.",
    )
    add_cluster(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the status; 1 when something is not ready."""

    async def show() -> int:
        status = await _look(args.data)
        print(json.dumps(status, indent=2) if args.json else _table(status))
        return 0 if all(process["ready"] for process in status["processes"]) else 1

    return finish(show())


async def _look(data: Path) -> dict[str, Any]:
    from steward.cli.operator_calls import Operator
    from steward.v1 import registry_service_pb2 as pb

    cluster = read_cluster(data)
    edges = [entry for entry in cluster.processes if entry.role == "edge"]
    answers, counts = await asyncio.gather(
        asyncio.gather(*(_ready(entry) for entry in cluster.processes)),
        asyncio.gather(*(_connections(entry) for entry in edges)),
    )
    connections = {entry.id: count for entry, count in zip(edges, counts, strict=True)}
    registry = cluster.address("registry")
    async with Operator(data) as operator:
        described = await operator.describe_cluster(registry)
        violations = await operator.list_violations(
            registry, pb.ListViolationsRequest(limit=1, newest=True)
        )
    return {
        "cluster": described.cluster,
        "url": cluster.url,
        "pid": cluster.pid,
        "revision": described.revision,
        "placements": described.placements,
        "edges": described.edges,
        "connections": sum(connections.values()),
        "refusals": violations.refusals,
        "breaches": violations.breaches,
        "processes": [
            {
                "role": entry.role,
                "id": entry.id,
                "pid": entry.pid,
                "ready": answer.ready,
                "why": answer.why,
                **({"connections": connections[entry.id]} if entry.id in connections else {}),
            }
            for entry, answer in zip(cluster.processes, answers, strict=True)
        ],
        "nodes": [
            {
                "node_id": node.node_id,
                "node_rev": node.node_rev,
                "address": node.address,
                "managers": node.managers,
                "capacity": node.capacity,
                "draining": node.draining,
            }
            for node in described.nodes
        ],
    }


async def _ready(entry: ProcessEntry) -> Readiness:
    return Readiness(True) if entry.ops is None else await readiness(entry.ops)


async def _connections(entry: ProcessEntry) -> int:
    """Open connections of an edge; 0 when it does not tell."""
    sums = {} if entry.ops is None else await metric_sums(entry.ops)
    return int(sums.get("steward_edge_connections", 0))


def _table(status: dict[str, Any]) -> str:
    lines = [
        f"{status['url']}  {status['placements']} users placed, "
        f"{status['connections']} connections at {status['edges']} edges, "
        f"revision {status['revision']}",
        f"  {status['refusals']} refusals, {status['breaches']} breaches"
        f"{': see `steward violations`' if status['breaches'] else ''}",
    ]
    for process in status["processes"]:
        state = "ready" if process["ready"] else f"not ready: {process['why']}"
        open_ = f", {process['connections']} connections" if "connections" in process else ""
        lines.append(f"  {process['id']:<12} pid {process['pid']:<8} {state}{open_}")
    for node in status["nodes"]:
        draining = ", draining" if node["draining"] else ""
        lines.append(
            f"  {node['node_id']:<12} rev {node['node_rev']:<8} "
            f"{node['managers']} of {node['capacity']} managers{draining}"
        )
    return "\n".join(lines)
