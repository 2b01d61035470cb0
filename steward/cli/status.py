"""`steward status`: a cluster as its registry has it, and the processes of one on this machine.

Nodes, placements and the open connections by edge come from the registry; with `--users` also
so many users, each with its node, epoch, connections and last sequence. The processes are those
of `cluster.json`, each asked on its ops port whether it is ready: of a cluster elsewhere there
is no such list. Refusals and breaches are those ever recorded.

Exit code 0 when the registry answers and every listed process is ready, else 1.
"""

import argparse
import asyncio
import json
from typing import TYPE_CHECKING, Any

from steward.cli.cluster_file import ProcessEntry
from steward.cli.counting import Counts, all_of, last_sequence, of_user
from steward.cli.operating import finish
from steward.cli.probe import Readiness, readiness
from steward.cli.target import Target, add_target
from steward.model.keys import UserKey

if TYPE_CHECKING:
    from steward.cli.operator_calls import Operator

MOST_USERS = 512
USERS = 20
READS_AT_ONCE = 16


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "status",
        help="show the processes and nodes of a running cluster",
        description="Show the processes, nodes and users of a running cluster.",
    )
    add_target(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--users",
        type=_count,
        nargs="?",
        const=USERS,
        default=0,
        metavar="N",
        help=f"also the first N users who are placed ({USERS}; at most {MOST_USERS})",
    )


def _count(text: str) -> int:
    if text.isascii() and text.isdecimal() and 0 < int(text) <= MOST_USERS:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MOST_USERS}")


def run(args: argparse.Namespace) -> int:
    """Print the status; 1 when something is not ready."""

    async def show(target: Target) -> int:
        status = await _look(target, args.users)
        print(json.dumps(status, indent=2) if args.json else _table(status))
        return 0 if all(process["ready"] for process in status["processes"]) else 1

    return finish(args, show)


async def _look(target: Target, users: int) -> dict[str, Any]:
    from steward.cli.operator_calls import Operator
    from steward.v1 import registry_service_pb2 as pb

    local = target.local
    entries = local.processes if local is not None else ()
    ready = await asyncio.gather(*(_ready(entry) for entry in entries))
    registry = target.registry
    async with Operator(target.key, target.cluster) as operator:
        described = await operator.describe_cluster(registry)
        connections = all_of(await operator.count_connections(registry))
        violations = await operator.list_violations(
            registry, pb.ListViolationsRequest(limit=1, newest=True)
        )
        placed = await _users(operator, registry, users) if users else None
    return {
        "cluster": described.cluster,
        "url": local.url if local is not None else None,
        "pid": local.pid if local is not None else None,
        "revision": described.revision,
        "placements": described.placements,
        "edges": described.edges,
        "connections": connections.total,
        "connections_by_edge": connections.by_edge,
        "refusals": violations.refusals,
        "breaches": violations.breaches,
        "processes": [
            {
                "role": entry.role,
                "id": entry.id,
                "pid": entry.pid,
                "ready": answer.ready,
                "why": answer.why,
            }
            for entry, answer in zip(entries, ready, strict=True)
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
        **({"users": placed} if placed is not None else {}),
    }


async def _ready(entry: ProcessEntry) -> Readiness:
    return Readiness(True) if entry.ops is None else await readiness(entry.ops)


async def _users(operator: "Operator", registry: str, most: int) -> list[dict[str, Any]]:
    """The first users who are placed, with what `steward where` says of each."""
    placements = await operator.first_placements(registry, most)
    keys = [UserKey(each.user.tenant_id, each.user.user_id) for each in placements]
    counted = await operator.count_connections(registry, keys)
    turns = asyncio.Semaphore(READS_AT_ONCE)

    async def sequence(address: str, user: UserKey) -> int | None:
        async with turns:
            return await last_sequence(operator, [address], user)

    sequences = await asyncio.gather(
        *(sequence(each.address, key) for each, key in zip(placements, keys, strict=True))
    )
    found = []
    for index, (user, placement) in enumerate(zip(keys, placements, strict=True)):
        counts = of_user(counted, index)
        found.append(
            {
                "tenant_id": user.tenant,
                "user_id": user.user,
                "node_id": placement.node_id,
                "epoch": placement.epoch,
                "connections": counts.total,
                "connections_by_edge": counts.by_edge,
                "sequence": sequences[index],
            }
        )
    return found


def _table(status: dict[str, Any]) -> str:
    lines = [
        f"{status['url'] or status['cluster']}  {status['placements']} users placed, "
        f"{status['edges']} edges, revision {status['revision']}",
        f"  {Counts(status['connections_by_edge'])}",
        f"  {status['refusals']} refusals, {status['breaches']} breaches"
        f"{': see `steward violations`' if status['breaches'] else ''}",
    ]
    for process in status["processes"]:
        state = "ready" if process["ready"] else f"not ready: {process['why']}"
        lines.append(f"  {process['id']:<12} pid {process['pid']:<8} {state}")
    for node in status["nodes"]:
        draining = ", draining" if node["draining"] else ""
        lines.append(
            f"  {node['node_id']:<12} rev {node['node_rev']:<8} "
            f"{node['managers']} of {node['capacity']} managers{draining}"
        )
    for user in status.get("users", ()):
        known = "unknown" if user["sequence"] is None else user["sequence"]
        lines.append(
            f"  {user['tenant_id']}/{user['user_id']:<12} {user['node_id']} epoch {user['epoch']}, "
            f"last sequence {known}, {Counts(user['connections_by_edge'])}"
        )
    return "\n".join(lines)
