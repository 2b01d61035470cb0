"""The command line of a tool for stores at rest, which `steward store` runs as a child.

The service says how its stores are copied and checked; the words, the bar and the exit codes
are the same for all. Exit codes: 0 done and well, 1 something is wrong with what a store holds,
or it failed on the way, 2 wrong use or a store that can't be used.
"""

import argparse
import asyncio
import sqlite3
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from steward.config.settings import SettingsError
from steward.runtime.service import EnvironmentUnusable

WRONG, UNUSABLE = 1, 2

Step = Callable[[int], None]
"""Told how many more of what a store holds are done."""


class StoreProblem(Exception):
    """A store that can't be used for what was asked, and why, for an operator."""


@contextmanager
def bar(what: str, total: int) -> Iterator[Step]:
    """A bar on standard error, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


def tell_faults(name: str, found: Sequence[str], number: int, whole: str) -> int:
    """Print what a check has found: the first ones of `number`, or `whole`. The exit code."""
    for text in found:
        print(text)
    if number:
        print(f"steward: {name} has {number} faults", file=sys.stderr)
        return WRONG
    print(f"{name} is whole: {whole}")
    return 0


def run(
    words: Sequence[str],
    description: str | None,
    check: Callable[[str], Awaitable[int]],
    copy: Callable[[str, str], Awaitable[int]],
    failures: tuple[type[Exception], ...],
) -> int:
    """Do what the words say, with stores as they are named there; the exit code.

    `check` and `copy` (source, destination) give exit codes. They raise StoreProblem,
    EnvironmentUnusable or SettingsError for a store that can't be used, and sqlite3.Error,
    OSError or one of `failures` when one fails on the way.
    """
    arguments = _arguments(words, description)
    on_the_way: tuple[type[Exception], ...] = (sqlite3.Error, OSError, *failures)

    async def do() -> int:
        if arguments.command == "check":
            return await check(arguments.store)
        return await copy(arguments.source, arguments.destination)

    try:
        return asyncio.run(do())
    except (StoreProblem, EnvironmentUnusable, SettingsError) as error:
        print(f"steward: {error}", file=sys.stderr)
        return UNUSABLE
    except on_the_way as error:
        print(f"steward: stopped on the way: {error}", file=sys.stderr)
        return WRONG


def _arguments(words: Sequence[str], description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="steward store", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    copying = commands.add_parser("copy")
    copying.add_argument("--from", dest="source", required=True)
    copying.add_argument("--to", dest="destination", required=True)
    checking = commands.add_parser("check")
    checking.add_argument("--store", required=True)
    return parser.parse_args(words)
