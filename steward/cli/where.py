"""`steward where USER`: which node holds a user's manager, by the registry.

Asks without placing: a user who is nowhere stays so. Prints `<node> epoch <n> <address>`,
or JSON. Exit code 1 when the user is nowhere.
"""

import argparse
import asyncio
import json
import sys

from steward.cli.cluster_file import NoCluster, read_cluster
from steward.cli.layout import data_path
from steward.errors import StewardError
from steward.model.keys import DEFAULT_TENANT, UserKey


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "where",
        help="say which node holds a user's manager",
        description="Print the node, epoch and address of a user's manager.",
    )
    parser.add_argument("user", metavar="USER")
    parser.add_argument("--data", type=data_path, default=".steward", metavar="DIR")
    parser.add_argument("--tenant", default=DEFAULT_TENANT, metavar="T", help="(default)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the placement; 1 when there is none, or no answer."""
    from steward.cli.operator_calls import Operator
    from steward.rpc.keys import KeyUnusable

    user = UserKey(args.tenant, args.user)

    async def ask() -> int:
        registry = read_cluster(args.data).address("registry")
        async with Operator(args.data) as operator:
            found = await operator.find_placement(registry, user)
        if not found.HasField("placement"):
            print(f"steward: {user} is nowhere: no manager is placed", file=sys.stderr)
            return 1
        placement = found.placement
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
                    }
                )
            )
        else:
            dead = "" if found.node_alive else " (node is dead; placed again on demand)"
            print(f"{placement.node_id} epoch {placement.epoch} {placement.address}{dead}")
        return 0

    try:
        return asyncio.run(ask())
    except StewardError as error:
        print(f"steward: {error}", file=sys.stderr)
        return 1
    except (NoCluster, KeyUnusable) as error:
        print(f"steward: {error}", file=sys.stderr)
        return 2
