"""The `steward` command.

Each subcommand is a module with `add_parser(subparsers)` and `run(args) -> exit code`;
only the one that is asked for is imported, so that `steward token` does not wait for
gRPC. `steward registry|auth|log|agent|edge` becomes the service itself, as in a
container. Results are on stdout, everything else on stderr. Exit codes: 0 done, 1
refused or failed, 2 wrong use or environment.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

COMMANDS: Mapping[str, str] = {
    "up": "start the whole cluster on this machine",
    "chat": "talk to an agent and see its events",
    "token": "make a token for a user",
    "where": "say which node holds a user's manager",
    "status": "show the processes and nodes of a running cluster",
    "drain": "move every user of a node away",
    "move": "move a user's manager to another node",
    "evict": "end a user's sessions",
    "violations": "show refusals and breaches",
    "compliance": "report whether one manager per user is kept, in code, cluster and under load",
    "attack": "play cheats against the cluster; each must be refused and recorded",
    "load": "put a running cluster under load and measure it",
    "store": "copy an event log from one engine to another, or check one",
    "backup": "put the stores and keys of a data directory into one file",
    "restore": "make a data directory of a backup",
    "supervise": "run an agent node under a process that tells of its death",
    "config": "list and check the settings of all services",
    "doctor": "check a machine and its cluster, and say how to mend what is wrong",
}

SERVICES: Mapping[str, str] = {
    "registry": "run a registry, as in a container",
    "auth": "run an auth service, as in a container",
    "log": "run the event log of one machine, as in a container",
    "agent": "run an agent node, as in a container",
    "edge": "run an edge, as in a container",
}

EXIT_WRONG_USE = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of the usage and a line."""

    def error(self, message: str) -> NoReturn:
        print(f"steward: {message}; see `{self.prog} --help`", file=sys.stderr)
        sys.exit(EXIT_WRONG_USE)


def main() -> int:
    """Entry point of the `steward` script; the exit code."""
    # Commands that start processes do it beside gRPC, whose handlers of a fork are for children
    # that go on with it; ours become other programs at once.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    return run_command(sys.argv[1:])


def run_command(argv: Sequence[str]) -> int:
    """Run one command line. SystemExit for wrong use and for --help, as argparse does."""
    if argv and argv[0] in SERVICES:
        _become_service(argv[0], argv[1:])
    parser = _Parser(prog="steward", description="The real-time home of AI agents.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = _chosen(argv)
    module: Any = None
    for name, summary in COMMANDS.items():
        if name == chosen:
            module = importlib.import_module(f"steward.cli.{name}")
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    for name, summary in SERVICES.items():
        subparsers.add_parser(name, help=summary)
    args = parser.parse_args(argv)
    try:
        return int(module.run(args))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _chosen(argv: Sequence[str]) -> str | None:
    return next((word for word in argv if not word.startswith("-")), None)


def _become_service(name: str, rest: Sequence[str]) -> NoReturn:
    from steward.cli.layout import service_command

    command = [*service_command(name), *rest]
    sys.stdout.flush()
    os.execv(command[0], command)
