"""`steward store`: move an event log from one engine to another, and check that one is whole.

`copy` wants both logs at rest: it takes the lock of a data directory, and refuses a PostgreSQL
database while a log process is connected to it (behind a pooler it can't see that). It may be
interrupted and run again. What the engines do is in the log's own tools, which run as a child.
"""

import argparse
import subprocess
import sys

TOOLS = "agent_service.log.tools"
NAME_HELP = "sqlite:DIR or postgresql://user@host/database"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "store",
        help="copy or check an event log",
        description="Copy an event log from one engine to another, or check one.",
    )
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    copy = commands.add_parser(
        "copy", help="copy a log that is at rest to another engine, and compare the two"
    )
    copy.add_argument("--from", dest="source", required=True, metavar="STORE", help=NAME_HELP)
    copy.add_argument("--to", dest="destination", required=True, metavar="STORE", help=NAME_HELP)
    check = commands.add_parser("check", help="say whether a log is whole; code 1 if it is not")
    check.add_argument("--store", required=True, metavar="STORE", help=NAME_HELP)


def run(args: argparse.Namespace) -> int:
    """Run it as a child that has our terminal; its exit code."""
    words = (
        ["check", "--store", args.store]
        if args.action == "check"
        else ["copy", "--from", args.source, "--to", args.destination]
    )
    return subprocess.run([sys.executable, "-m", TOOLS, *words], check=False).returncode
