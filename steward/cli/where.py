"""`steward where USER`: which node holds a user's manager, by the registry.

Asks without placing: a user who is nowhere stays so. Prints the node, the epoch, its
address, the last stored sequence and the user's open connections by edge, or JSON. What
nobody answers in time is unknown (null). Exit code 1 when the user is nowhere.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from steward.cli.counting import last_sequence, of_user
from steward.cli.operating import add_user, operate, user_of
from steward.cli.target import add_target

if TYPE_CHECKING:
    from steward.cli.operator_calls import Operator


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "where",
        help="say which node holds a user's manager",
        description="Print where a user's manager is, how far its stream, and who is connected.",
    )
    add_user(parser)
    add_target(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the placement; 1 when there is none, or no answer."""
    return operate(args, lambda operator, registry: _find(args, operator, registry))


async def _find(args: argparse.Namespace, operator: "Operator", registry: str) -> int:
    user = user_of(args)
    found = await operator.find_placement(registry, user)
    if not found.HasField("placement"):
        print(f"steward: {user} is nowhere: no manager is placed", file=sys.stderr)
        return 1
    placement = found.placement
    connections = of_user(await operator.count_connections(registry, [user]), 0)
    nodes = [placement.address]
    if not found.node_alive:
        # What is stored can be read through any node that lives.
        nodes = [node.address for node in (await operator.describe_cluster(registry)).nodes]
    sequence = await last_sequence(operator, nodes, user)
    if args.json:
        print(
            json.dumps(
                {
                    "tenant_id": user.tenant,
                    "user_id": user.user,
                    "node_id": placement.node_id,
                    "node_rev": placement.node_rev,
                    "epoch": placement.epoch,
                    "address": placement.address,
                    "node_alive": found.node_alive,
                    "edges": list(found.edges),
                    "connections": connections.total,
                    "connections_by_edge": connections.by_edge,
                    "sequence": sequence,
                }
            )
        )
        return 0
    dead = "" if found.node_alive else " (node is dead; placed again on demand)"
    print(f"{placement.node_id} epoch {placement.epoch} {placement.address}{dead}")
    known = "unknown" if sequence is None else str(sequence)
    print(f"last sequence {known}; {connections}")
    return 0
