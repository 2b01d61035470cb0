"""`steward evict USER`: end a user's sessions everywhere, and what runs for them.

Every connection is closed with 4503, which tells clients to stop; open runs are
cancelled; the manager is put away. It bars nobody: a valid token opens a new session, so
revoke the tokens first to keep a user out.
"""

import argparse
from typing import TYPE_CHECKING

from steward.cli.operating import add_user, operate, user_of
from steward.cli.target import add_target
from steward.model.evidence import clean

if TYPE_CHECKING:
    from steward.cli.operator_calls import Operator


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "evict",
        help="end a user's sessions",
        description="End a user's sessions at every edge and put the manager away.",
    )
    add_user(parser)
    parser.add_argument("--cause", default="operator", metavar="TEXT", help="kept in the ledger")
    add_target(parser)


def run(args: argparse.Namespace) -> int:
    """Evict; 1 when the user is nowhere."""

    async def evict(operator: "Operator", registry: str) -> int:
        epoch = await operator.evict_user(registry, user_of(args), clean(args.cause))
        print(f"{user_of(args)} evicted: epoch {epoch} is over")
        return 0

    return operate(args, evict)
