"""`steward attack`: play every cheat against the running cluster, and see that none works.

A cheat passes when nothing of it had an effect, it is on record as a refusal, and no breach
was recorded. Exit code 0 when all that were played passed, 1 when one did not, 2 for wrong use.
It is safe on a cluster in service: it uses users of a tenant of its own.

Of a cluster elsewhere it has to be told more than other commands: the log, an edge, the key of
user tokens, and the address of this machine, by which edges reach the false node that it joins.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steward.cli.cluster_file import NoCluster
from steward.cli.operating import finish
from steward.cli.target import Target, WrongTarget, add_target, address_of

if TYPE_CHECKING:
    from steward.cli.cheats import Cheat, Doors, Field

LOOPBACK = "127.0.0.1"
RECORDED_S = 5.0
POLL_S = 0.05


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "attack",
        help="play cheats against the cluster; each must be refused and recorded",
        description="Play cheats against the running cluster; each must be refused and recorded.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="which ones; --list names them")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--list", action="store_true", help="name them, and play none")
    add_target(parser)
    doors = parser.add_argument_group("with --registry")
    doors.add_argument("--log", metavar="HOST:PORT", help="the gRPC address of the log")
    doors.add_argument("--url", metavar="URL", help="the URL of an edge")
    doors.add_argument("--user-key-file", type=Path, metavar="FILE", help="auth's keys/user.key")
    doors.add_argument(
        "--host", default=LOOPBACK, metavar="HOST", help=f"this machine, for edges ({LOOPBACK})"
    )


def run(args: argparse.Namespace) -> int:
    """Play; 1 when a cheat worked or left no record."""
    from steward.cli.cheats import CHEATS

    if args.list:
        for cheat in CHEATS:
            print(f"{cheat.name:<28} {cheat.summary}")
        return 0
    by_name = {cheat.name: cheat for cheat in CHEATS}
    unknown = [name for name in args.names if name not in by_name]
    if unknown or bool(args.names) == args.all:
        what = f"no cheat is called {unknown[0]!r}" if unknown else "name cheats, or say --all"
        print(f"steward: {what}; `steward attack --list` names them", file=sys.stderr)
        return 2
    chosen = CHEATS if args.all else tuple(by_name[name] for name in args.names)
    return finish(args, lambda target: _play_all(target, doors_of(args, target), chosen))


def doors_here(target: Target) -> "Doors":
    """What is played against on this machine. Raises NoCluster, KeyUnusable."""
    from steward.cli.cheats import Doors
    from steward.rpc.keys import USER_KEY, load_key

    if target.local is None:
        raise NoCluster("the cluster is not on this machine")
    key = load_key(target.data / "keys" / USER_KEY)
    return Doors(target.local.address("log"), target.local.url, key, LOOPBACK)


def doors_of(args: argparse.Namespace, target: Target) -> "Doors":
    """What is played against. Raises WrongTarget, NoCluster, KeyUnusable."""
    from steward.cli.cheats import Doors
    from steward.rpc.keys import USER_KEY, load_key

    local = target.local
    if local is not None:
        key = load_key(args.user_key_file or target.data / "keys" / USER_KEY)
        return Doors(args.log or local.address("log"), args.url or local.url, key, args.host)
    missing = [
        option
        for option, value in (
            ("--log", args.log),
            ("--url", args.url),
            ("--user-key-file", args.user_key_file),
        )
        if not value
    ]
    if missing:
        raise WrongTarget(f"attack with --registry needs {', '.join(missing)} too")
    log = address_of(args.log, "--log")
    return Doors(log, args.url.rstrip("/"), load_key(args.user_key_file), args.host)


async def _play_all(target: Target, doors: "Doors", chosen: Sequence["Cheat"]) -> int:
    failed = 0
    async for played in play_each(target, doors, chosen):
        failed += bool(played.trouble)
        mark = "FAILED " if played.trouble else "refused"
        print(f"{mark} {played.cheat:<28} {played.trouble or played.said}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} cheats were refused and recorded")
    return 1 if failed else 0


@dataclass(frozen=True, slots=True)
class Played:
    """A cheat that was played: what is wrong (empty: nothing), and what refused it."""

    cheat: str
    trouble: str
    said: str


async def play_each(
    target: Target, doors: "Doors", chosen: Sequence["Cheat"]
) -> AsyncIterator[Played]:
    """Play these against the cluster, one after the other."""
    import aiohttp

    from steward.cli.cheats import Field

    async with aiohttp.ClientSession() as http:
        field = Field(target, doors, http)
        try:
            for cheat in chosen:
                trouble, said = await _play(field, cheat)
                yield Played(cheat.name, trouble, said)
        finally:
            await field.close()


async def _play(field: "Field", cheat: "Cheat") -> tuple[str, str]:
    """What is wrong (empty: nothing), and what refused it."""
    from steward.cli.cheats import CheatWorked

    last, breaches = await _recorded(field)
    try:
        said = await cheat.play(field)
    except CheatWorked as worked:
        return f"IT WORKED: {worked}", ""
    except Exception as error:
        return f"could not be played: {type(error).__name__}: {error}", ""
    kind = await _find(field, cheat, last)
    if kind is None:
        return f"refused ({said}), but not on record as {' or '.join(sorted(cheat.kinds))}", ""
    if (await _recorded(field))[1] > breaches:
        return "a breach was recorded; see `steward violations --breaches`", ""
    return "", f"{said}; recorded as {kind}"


async def _recorded(field: "Field") -> tuple[int, int]:
    """Number of the last violation, and how many breaches there are."""
    from steward.v1 import registry_service_pb2 as pb

    page = await field.operator.list_violations(
        field.registry, pb.ListViolationsRequest(limit=1, newest=True)
    )
    return (page.violations[-1].number if page.violations else 0), page.breaches


async def _find(field: "Field", cheat: "Cheat", last: int) -> str | None:
    """The kind under which the cheat was recorded after `last`; None when it was not in time."""
    from steward.v1 import registry_service_pb2 as pb

    until = time.monotonic() + RECORDED_S
    while True:
        page = await field.operator.list_violations(
            field.registry, pb.ListViolationsRequest(after=last, limit=1000)
        )
        for violation in page.violations:
            if violation.kind in cheat.kinds:
                return str(violation.kind)
        if time.monotonic() > until:
            return None
        await asyncio.sleep(POLL_S)
