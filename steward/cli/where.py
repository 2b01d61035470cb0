"""`steward where USER`: which node holds a user's manager, by the registry.

Asks without placing: a user who is nowhere stays so. Prints the node, the epoch, its
address, the last stored sequence and the edges that asked for the user, or JSON. Exit code
1 when the user is nowhere.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from steward.cli.operating import add_cluster, add_user, operate, user_of
from steward.errors import StewardError
from steward.model.keys import UserKey

if TYPE_CHECKING:
    from steward.cli.operator_calls import Operator


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "where",
        help="say which node holds a user's manager",
        description="Print where a user's manager is, and how far its stream.",
    )
    add_user(parser)
    add_cluster(parser)
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
    sequence = await _sequence(operator, placement.address, user) if found.node_alive else None
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
                    **({"sequence": sequence} if sequence is not None else {}),
                }
            )
        )
        return 0
    dead = "" if found.node_alive else " (node is dead; placed again on demand)"
    print(f"{placement.node_id} epoch {placement.epoch} {placement.address}{dead}")
    known = "unknown" if sequence is None else str(sequence)
    print(f"last sequence {known}; edges: {', '.join(found.edges) or 'none asked'}")
    return 0


async def _sequence(operator: "Operator", node: str, user: UserKey) -> int | None:
    """The last stored sequence; None when the node does not answer."""
    try:
        return await operator.last_sequence(node, user)
    except StewardError:
        return None
