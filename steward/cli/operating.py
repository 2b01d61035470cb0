"""What the operator's commands share: options that name a cluster, and how they end.

A command is a coroutine that gets an `Operator` and the registry's address. Exit codes:
0 done, 1 refused or failed (a row of the error table, on stderr), 2 wrong use or
environment (no running cluster, a key that can't be read).
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING

from steward.cli.cluster_file import NoCluster, read_cluster
from steward.cli.layout import data_path
from steward.errors import StewardError
from steward.model.keys import DEFAULT_TENANT, UserKey

if TYPE_CHECKING:
    from steward.cli.operator_calls import Operator

Command = Callable[["Operator", str], Awaitable[int]]


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """The option that says which cluster is meant."""
    parser.add_argument("--data", type=data_path, default=".steward", metavar="DIR")


def add_user(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a user."""
    parser.add_argument("user", metavar="USER")
    parser.add_argument("--tenant", default=DEFAULT_TENANT, metavar="T", help="(default)")


def user_of(args: argparse.Namespace) -> UserKey:
    return UserKey(args.tenant, args.user)


def operate(args: argparse.Namespace, command: Command) -> int:
    """Run `command` against the cluster of `--data`; the exit code."""
    from steward.cli.operator_calls import Operator

    async def run() -> int:
        registry = read_cluster(args.data).address("registry")
        async with Operator(args.data) as operator:
            return await command(operator, registry)

    return finish(run())


def finish(command: Coroutine[None, None, int]) -> int:
    """Run a command to its end; the exit code, also for what it raises."""
    from steward.rpc.keys import KeyUnusable

    try:
        return asyncio.run(command)
    except StewardError as error:
        print(f"steward: {error}", file=sys.stderr)
        return 1
    except (NoCluster, KeyUnusable) as error:
        print(f"steward: {error}", file=sys.stderr)
        return 2
