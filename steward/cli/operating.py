"""What the operator's commands share: options that name a cluster, and how they end.

A command is a coroutine that gets an `Operator`, which knows the cluster. Exit codes: 0 done,
1 refused or failed (a row of the error table, on stderr), 2 wrong use or environment (no
running cluster, a key that can't be read, an address that is none). A mistake is one line.
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING

from steward.cli.cluster_file import NoCluster
from steward.cli.target import Target, WrongTarget, target_of
from steward.errors import Reason, StewardError
from steward.model.keys import DEFAULT_TENANT, UserKey

if TYPE_CHECKING:
    from steward.cli.operator_calls import Operator

Command = Callable[["Operator", str], Awaitable[int]]


def add_user(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a user."""
    parser.add_argument("user", metavar="USER")
    parser.add_argument("--tenant", default=DEFAULT_TENANT, metavar="T", help="(default)")


def user_of(args: argparse.Namespace) -> UserKey:
    """The user of the arguments. Raises StewardError(PROTOCOL_VIOLATION) for what is no id."""
    return UserKey(_id(args.tenant, "tenant_id"), _id(args.user, "user_id"))


def node_of(args: argparse.Namespace) -> str:
    """The node of the arguments, which may be empty. Raises like `user_of`."""
    return _id(args.node, "node_id") if args.node else ""


def _id(text: str, what: str) -> str:
    """The registry checks it too; here because not every text of a shell can be sent."""
    from steward.tokens import MAX_ID_CHARS, is_id

    if not is_id(text):
        raise StewardError(
            Reason.PROTOCOL_VIOLATION, f"{what} must have 1 to {MAX_ID_CHARS} printable characters"
        )
    return text


def operate(args: argparse.Namespace, command: Command) -> int:
    """Run `command` with the cluster that `args` name; the exit code."""
    return finish(args, lambda target: _operate(target, command))


async def _operate(target: Target, command: Command) -> int:
    from steward.cli.operator_calls import Operator

    async with Operator(target.key, target.cluster) as operator:
        return await command(operator, target.registry)


def finish(
    args: argparse.Namespace, command: Callable[[Target], Coroutine[None, None, int]]
) -> int:
    """Run a command to its end; the exit code, also for what it raises."""
    from steward.rpc.keys import KeyUnusable

    try:
        return asyncio.run(command(target_of(args)))
    except StewardError as error:
        print(f"steward: {error}", file=sys.stderr)
        return 1
    except (NoCluster, WrongTarget, KeyUnusable) as error:
        print(f"steward: {error}", file=sys.stderr)
        return 2
