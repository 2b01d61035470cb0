"""`steward move USER [NODE]`: a planned move of one user, which its clients see as a short pause.

The open runs go with the user. Without a node the registry chooses another one. Safe to
repeat: a user who is there already stays.
"""

import argparse
import time
from typing import TYPE_CHECKING

from steward.cli.operating import add_user, node_of, operate, user_of
from steward.cli.target import add_target

if TYPE_CHECKING:
    from steward.cli.operator_calls import Operator


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "move",
        help="move a user's manager to another node",
        description="Move a user's manager, with its open runs, to another node.",
    )
    add_user(parser)
    parser.add_argument("node", metavar="NODE", nargs="?", default="", help="where to (any other)")
    add_target(parser)


def run(args: argparse.Namespace) -> int:
    """Move; 1 when the registry refuses, or the node does not let go in time."""

    async def move(operator: "Operator", registry: str) -> int:
        began = time.monotonic()
        moved = await operator.move_user(registry, user_of(args), node_of(args))
        took_ms = (time.monotonic() - began) * 1000
        placement = moved.placement
        print(
            f"{user_of(args)}: {moved.from_node} -> {placement.node_id} "
            f"epoch {placement.epoch}, {took_ms:.0f} ms"
        )
        return 0

    return operate(args, move)
