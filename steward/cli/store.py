"""`steward store`: move an event log or a registry's store to another engine, and check one.

`copy` wants both sides at rest: it takes the lock of a data directory, and of a registry's store on
etcd the key of its leader; it refuses a PostgreSQL database while a log process is connected to
it (behind a pooler it can't see that). It may be interrupted and run again. What the engines
do is in the tools of the log and of the registry, which run as a child.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from steward.cli.backup_file import EVENTS, REGISTRY

LOG_TOOLS = "agent_service.log.tools"
REGISTRY_TOOLS = "registry_service.store.tools"
ETCD = "etcd://"
SQLITE = "sqlite:"
NAME_HELP = (
    "sqlite:DIR, postgresql://user@host/database (an event log) or etcd://host,host/cluster"
    " (a registry's store)"
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "store",
        help="copy or check an event log or a registry's store",
        description="Copy an event log, or a registry's store, from one engine to another, or"
        " check one.",
    )
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    copy = commands.add_parser(
        "copy", help="copy a store that is at rest to another engine, and compare the two"
    )
    copy.add_argument("--from", dest="source", required=True, metavar="STORE", help=NAME_HELP)
    copy.add_argument("--to", dest="destination", required=True, metavar="STORE", help=NAME_HELP)
    check = commands.add_parser("check", help="say whether a store is whole; code 1 if it is not")
    check.add_argument("--store", required=True, metavar="STORE", help=NAME_HELP)


def run(args: argparse.Namespace) -> int:
    """Run it as a child that has our terminal; its exit code."""
    if args.action == "check":
        words = ["check", "--store", args.store]
        # Of the worst: a directory may have both stores.
        return max(_run(tools, words) for tools in _tools_of(args.store))
    words = ["copy", "--from", args.source, "--to", args.destination]
    is_registry = ETCD in (args.source[: len(ETCD)], args.destination[: len(ETCD)])
    return _run(REGISTRY_TOOLS if is_registry else LOG_TOOLS, words)


def _tools_of(store: str) -> tuple[str, ...]:
    """Whose tools check this store."""
    if store.startswith(ETCD):
        return (REGISTRY_TOOLS,)
    directory = Path(store.removeprefix(SQLITE))
    if store.startswith(SQLITE) and (directory / REGISTRY).exists():
        has_log = (directory / EVENTS).exists()
        return (LOG_TOOLS, REGISTRY_TOOLS) if has_log else (REGISTRY_TOOLS,)
    return (LOG_TOOLS,)


def _run(tools: str, words: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", tools, *words], check=False).returncode
