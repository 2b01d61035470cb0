"""`steward backup`: the embedded stores and the keys of a data directory in one file.

The cluster may run and be busy; nothing is stopped for it. Stores that are elsewhere (etcd,
PostgreSQL) are not in it: they have backups of their own.
"""

import argparse
import sys
from pathlib import Path

from steward.cli.backup_file import EVENTS, REGISTRY, BackupProblem, back_up
from steward.cli.layout import data_path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "backup",
        help="put the stores and keys of a data directory into one file",
        description="Put the stores and keys of a data directory into one file; it may be in use."
        " The file holds keys: keep it as safe as these.",
    )
    parser.add_argument("--data", type=data_path, default=".steward", metavar="DIR")
    parser.add_argument("file", type=Path, metavar="FILE", help="made; it must not exist")


def run(args: argparse.Namespace) -> int:
    """Make the backup; the exit code."""
    data = data_path(str(args.data))
    try:
        entries = back_up(data, args.file.absolute(), _say)
    except BackupProblem as problem:
        print(f"steward: {problem}", file=sys.stderr)
        return 1
    for entry in entries:
        print(f"{entry.name}  {entry.bytes} bytes  sha256 {entry.sha256}")
    names = {entry.name for entry in entries}
    for name, what in ((EVENTS, "event log"), (REGISTRY, "registry's store")):
        if name not in names:
            print(f"steward: no {name}: the {what} is elsewhere, and not in this", file=sys.stderr)
    return 0


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"steward: {text}", file=sys.stderr)
