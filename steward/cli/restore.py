"""`steward restore`: a data directory, made of what `steward backup` wrote.

It is made whole or not at all, and never over something else. The registry that is started on it
raises the generation by itself, since there is no witness: every epoch and node of before is
then over.
"""

import argparse
import sys
from pathlib import Path

from steward.cli.backup_file import BackupProblem, restore
from steward.cli.layout import data_path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "restore",
        help="make a data directory of a backup",
        description="Make a data directory of a backup. It must be new: move an old one away.",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--data", type=data_path, required=True, metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Restore; the exit code."""
    try:
        entries = restore(args.file, args.data, lambda _: None)
    except BackupProblem as problem:
        print(f"steward: {problem}", file=sys.stderr)
        return 1
    print(f"{args.data}: {', '.join(entry.name for entry in entries)}")
    print("All processes of before must be stopped; then start the cluster on this directory.")
    return 0
