"""`python -m agent_service.log.tools`: copy or check event logs at rest. `steward store` calls it.

Exit codes: 0 done and well, 1 something is wrong with what a store holds, or it failed on the
way, 2 wrong use or a store that can't be used.
"""

import argparse
import asyncio
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import asyncpg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agent_service.log.tools.checking import check
from agent_service.log.tools.copying import Step, compare, copy
from agent_service.log.tools.postgres_store import PostgresStore
from agent_service.log.tools.sqlite_store import SqliteStore
from agent_service.log.tools.store import Store, StoreProblem
from steward.postgres.connecting import is_postgres
from steward.runtime.service import EnvironmentUnusable

WRONG, UNUSABLE = 1, 2


def store_of(text: str, *, make: bool, alone: bool) -> Store:
    """The store that `sqlite:DIR` or `postgresql://…` names. Raises StoreProblem."""
    if is_postgres(text):
        return PostgresStore(text, alone=alone)
    scheme, colon, path = text.partition(":")
    if scheme == "sqlite" and colon and path:
        return SqliteStore(Path(path), make=make)
    raise StoreProblem("name a store as sqlite:DIR or postgresql://user@host/database")


@contextmanager
def _bar(what: str, events: int) -> Iterator[Step]:
    """A bar of events on standard error, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(what, total=events)
        yield lambda done: progress.advance(task, done)


async def _copy(source: Store, destination: Store) -> int:
    try:
        await source.open()
        await destination.open()
        events = (await source.totals()).events
        with _bar("copying", events) as step:
            done = await copy(source, destination, step)
        with _bar("comparing", events) as step:
            await compare(source, destination, done, step)
        totals = await source.totals()
    finally:
        await source.close()
        await destination.close()
    if done.differing:
        print(f"steward: {done.first_difference} ({done.differing} differences)", file=sys.stderr)
        return WRONG
    print(
        f"{destination.name} has all of {source.name}: {totals.events} events of"
        f" {totals.streams} users, compared by digest ({done.streams} copied, {done.kept} were"
        " there)"
    )
    return 0


async def _check(store: Store) -> int:
    try:
        await store.open()
        totals = await store.totals()
        with _bar("checking", totals.events) as step:
            found, number = await check(store, step)
    finally:
        await store.close()
    for text in found:
        print(text)
    if number:
        print(f"steward: {store.name} has {number} faults", file=sys.stderr)
        return WRONG
    print(f"{store.name} is whole: {totals.events} events of {totals.streams} users")
    return 0


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="steward store", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    copying = commands.add_parser("copy")
    copying.add_argument("--from", dest="source", required=True)
    copying.add_argument("--to", dest="destination", required=True)
    checking = commands.add_parser("check")
    checking.add_argument("--store", required=True)
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    """Do what the words say; the exit code."""
    arguments = _arguments(words)
    try:
        if arguments.command == "check":
            return asyncio.run(_check(store_of(arguments.store, make=False, alone=False)))
        source = store_of(arguments.source, make=False, alone=True)
        destination = store_of(arguments.destination, make=True, alone=True)
        return asyncio.run(_copy(source, destination))
    except (StoreProblem, EnvironmentUnusable) as error:
        print(f"steward: {error}", file=sys.stderr)
        return UNUSABLE
    except (sqlite3.Error, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        print(f"steward: stopped on the way: {error}", file=sys.stderr)
        return WRONG


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
