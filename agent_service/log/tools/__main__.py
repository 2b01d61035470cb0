"""`python -m agent_service.log.tools`: copy or check event logs at rest. `steward store` calls it.

Exit codes: 0 done and well, 1 something is wrong with what a store holds, or it failed on the
way, 2 wrong use or a store that can't be used.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import asyncpg

from agent_service.log.tools.checking import check
from agent_service.log.tools.copying import compare, copy
from agent_service.log.tools.postgres_store import PostgresStore
from agent_service.log.tools.sqlite_store import SqliteStore
from agent_service.log.tools.store import Store
from steward.postgres.connecting import is_postgres
from steward.runtime.store_tool import WRONG, StoreProblem, bar, run, tell_faults


def store_of(text: str, *, make: bool, alone: bool) -> Store:
    """The store that `sqlite:DIR` or `postgresql://…` names. Raises StoreProblem."""
    if is_postgres(text):
        return PostgresStore(text, alone=alone)
    scheme, colon, path = text.partition(":")
    if scheme == "sqlite" and colon and path:
        return SqliteStore(Path(path), make=make)
    raise StoreProblem("name a store as sqlite:DIR or postgresql://user@host/database")


async def _copy(from_: str, to: str) -> int:
    source = store_of(from_, make=False, alone=True)
    destination = store_of(to, make=True, alone=True)
    try:
        await source.open()
        await destination.open()
        events = (await source.totals()).events
        with bar("copying", events) as step:
            done = await copy(source, destination, step)
        with bar("comparing", events) as step:
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


async def _check(name: str) -> int:
    store = store_of(name, make=False, alone=False)
    try:
        await store.open()
        totals = await store.totals()
        with bar("checking", totals.events) as step:
            found, number = await check(store, step)
    finally:
        await store.close()
    whole = f"{totals.events} events of {totals.streams} users"
    return tell_faults(store.name, found, number, whole)


def main(words: Sequence[str]) -> int:
    """Do what the words say; the exit code."""
    return run(words, __doc__, _check, _copy, (asyncpg.PostgresError, asyncpg.InterfaceError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
