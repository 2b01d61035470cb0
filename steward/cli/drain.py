"""`steward drain NODE`: move every user of a node away, without a break that users see.

Waits, with a progress line, until nobody is left; interrupting it leaves the drain going on.
The node stays drained until its process ends: a new process under the same name takes
users again. `--now` fences the node instead: its users are taken over at once, unplanned.
"""

import argparse
import asyncio
import sys
import time
from typing import TYPE_CHECKING

from steward.cli.operating import node_of, operate
from steward.cli.target import add_target

if TYPE_CHECKING:
    from steward.cli.operator_calls import Operator

POLL_S = 0.1


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "drain",
        help="move every user of a node away",
        description="Place nobody on a node any more, and move its users away in waves.",
    )
    parser.add_argument("node", metavar="NODE")
    add_target(parser)
    parser.add_argument("--no-wait", action="store_true", help="return when the drain has begun")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="how long to wait (300 s)"
    )
    parser.add_argument(
        "--now", action="store_true", help="fence the node: take its users over, unplanned"
    )


def run(args: argparse.Namespace) -> int:
    """Drain; 1 when users are left at the end of the time."""
    return operate(args, lambda operator, registry: _drain(args, operator, registry))


async def _drain(args: argparse.Namespace, operator: "Operator", registry: str) -> int:
    node = node_of(args)
    if args.now:
        node_rev = await operator.fence_node(registry, node, "operator")
        print(f"{node} fenced: incarnation {node_rev} is over")
        return 0
    began = time.monotonic()
    answer = await operator.drain_node(registry, node)
    total = left = answer.placements
    if args.no_wait:
        print(f"{node} drains: {left} users to move")
        return 0
    while left and time.monotonic() - began < args.timeout:
        _progress(node, total, left)
        await asyncio.sleep(POLL_S)
        left = (await operator.drain_node(registry, node)).placements
        total = max(total, left)
    _progress(node, total, left)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    took_s = time.monotonic() - began
    if left:
        print(
            f"steward: {left} users are left on {node} after {took_s:.0f} s; it drains on",
            file=sys.stderr,
        )
        return 1
    print(f"{node} is drained: {total} users moved in {took_s:.1f} s")
    return 0


def _progress(node: str, total: int, left: int) -> None:
    """One line that is written over; nothing where nobody looks."""
    if sys.stderr.isatty():
        width = 30
        done = width * (total - left) // max(total, 1) if total else width
        bar = "#" * done + "." * (width - done)
        print(f"\r{node} [{bar}] {total - left} of {total} users moved ", end="", file=sys.stderr)
