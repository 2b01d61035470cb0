"""`steward load`: put a running cluster under load, and check every stream while measuring it.

Each user has connections of its own and one run of the agent `steward.load.agent:load`, which
emits at the rate asked for, or as fast as it can. The clients are processes of their own. A gap,
a repeat, an event of another stream or a lost connection ends it with exit code 1 and without a
figure; wrong use and a cluster that isn't there are 2. On the machine of a `steward up` it also
tells what CPU time an event costs each process; elsewhere name the edge by `--url` and bring
tokens, one for each user.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from steward.cli.cluster_file import ClusterFile, NoCluster, read_cluster
from steward.cli.layout import data_path
from steward.cli.target import DEFAULT_DATA, WrongTarget

if TYPE_CHECKING:
    from steward.load.plan import LoadPlan

AGENT = "load"
TENANT = "load"
"""Of the users that it makes up: nobody else's streams are touched."""

USERS, SECONDS = 50, 10.0
TOKEN_S = 2 * 3600


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "load",
        help="put a running cluster under load and measure it",
        description="Put a running cluster under load, checking every stream while it is measured. "
        "The cluster must serve the agent: `steward up --agent steward.load.agent:load`.",
    )
    parser.add_argument("--users", type=int, metavar="N", help=f"users, a run each ({USERS})")
    parser.add_argument("--tabs", type=int, default=1, metavar="N", help="connections of each (1)")
    parser.add_argument(
        "--rate", type=float, default=0.0, metavar="R", help="events/s in all (as many as it can)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help=f"how long ({SECONDS:g})"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="client processes (half the CPUs)")
    parser.add_argument("--agent", default=AGENT, metavar="NAME", help=f"what emits ({AGENT})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    group = parser.add_argument_group("which cluster")
    group.add_argument(
        "--data",
        type=data_path,
        metavar="DIR",
        help=f"that of a `steward up` on this machine ({DEFAULT_DATA})",
    )
    group.add_argument("--url", metavar="URL", help="an edge of another one; needs tokens")
    group.add_argument(
        "--token", action="append", default=[], metavar="T", help="of one user; repeatable"
    )
    group.add_argument("--tokens", type=Path, metavar="FILE", help="tokens, one a line")


def run(args: argparse.Namespace) -> int:
    """Load and print what was found; the exit code."""
    from steward.cli.load_view import LoadView, print_json, print_table
    from steward.load.generator import LoadBroken, generate
    from steward.load.plan import WrongPlan
    from steward.rpc.keys import KeyUnusable

    try:
        cluster = None if args.url else read_cluster(args.data or data_path(DEFAULT_DATA))
        plan = _plan_elsewhere(args) if cluster is None else _plan_here(args, cluster)
    except (WrongPlan, WrongTarget, NoCluster, KeyUnusable) as error:
        print(f"steward: {error}", file=sys.stderr)
        return 2
    pids = {entry.id: entry.pid for entry in cluster.processes} if cluster else {}
    view = LoadView(plan, pids)
    try:
        with view:
            found = generate(plan, view)
    except LoadBroken as error:
        print(f"steward: {error}{_hint(str(error), args.agent)}", file=sys.stderr)
        return 1
    if not found.latency.total:
        text = f"no event of {args.agent!r} says when it was made; is it another agent?"
        print(f"steward: {text}", file=sys.stderr)
        return 1
    show = print_json if args.json else print_table
    show(plan, found, view.costs(found.events))
    return 0


def _hint(error: str, agent: str) -> str:
    if "NOT_FOUND" in error and agent == AGENT:
        return "; start the cluster with `steward up --agent steward.load.agent:load`"
    return ""


def _plan_here(args: argparse.Namespace, cluster: ClusterFile) -> "LoadPlan":
    """For a cluster of this machine: users of its own, over all edges."""
    if args.token or args.tokens:
        raise WrongTarget("tokens go with --url; on this machine they are made")
    count = USERS if args.users is None else args.users
    edges, users = _users_here(cluster, args.data or data_path(DEFAULT_DATA), count)
    return _plan(args, edges, secure=False, users=users)


def plan_here(
    cluster: ClusterFile, data: Path, *, users: int, rate: float, seconds: float
) -> "LoadPlan":
    """The plan of a load on a cluster of this machine, by one client process.

    Raises WrongPlan, and KeyUnusable of `steward.rpc.keys`.
    """
    from steward.load.plan import LoadPlan

    edges, made = _users_here(cluster, data, users)
    return LoadPlan(edges, False, made, 1, rate, seconds, AGENT, 1)


def _users_here(
    cluster: ClusterFile, data: Path, count: int
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """The edges, and names and tokens of users of our own."""
    from steward.load.plan import MOST_USERS, WrongPlan
    from steward.model.keys import UserKey
    from steward.rpc.keys import USER_KEY, load_key
    from steward.tokens import mint

    if not 1 <= count <= MOST_USERS:
        raise WrongPlan(f"--users {count}: 1 to {MOST_USERS:,} are possible")
    key = load_key(data / "keys" / USER_KEY)
    names = [f"load-{number}" for number in range(count)]
    users = tuple((name, mint(key, UserKey(TENANT, name), TOKEN_S)) for name in names)
    return tuple(entry.http for entry in cluster.processes if entry.http is not None), users


def _plan_elsewhere(args: argparse.Namespace) -> "LoadPlan":
    """For a cluster anywhere: one user for each token."""
    if args.data:
        raise WrongTarget("--data and --url name two clusters; say which")
    parts = urlsplit(args.url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise WrongTarget(f"--url: {args.url!r} is not an URL like http://name:port")
    secure = parts.scheme == "https"
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    address = f"{host}:{port or (443 if secure else 80)}"
    tokens = [*args.token, *_tokens_of(args.tokens)]
    if not tokens:
        raise WrongTarget("--url needs tokens, one for each user: --token T, or --tokens FILE")
    if args.users is not None and args.users > len(tokens):
        raise WrongTarget(f"--users {args.users}, but there are {len(tokens)} tokens")
    users = tuple((f"user {n}", token) for n, token in enumerate(tokens[: args.users], 1))
    return _plan(args, (address,), secure=secure, users=users)


def _tokens_of(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise WrongTarget(f"--tokens {path}: {error}") from None


def _plan(
    args: argparse.Namespace,
    addresses: tuple[str, ...],
    *,
    secure: bool,
    users: tuple[tuple[str, str], ...],
) -> "LoadPlan":
    from steward.load.plan import LoadPlan, WrongPlan

    for name, token in users:
        if not (token and token.isascii() and token.isprintable()):
            raise WrongPlan(f"the token of {name} is none")
    workers = max(len(os.sched_getaffinity(0)) // 2, 1) if args.workers is None else args.workers
    return LoadPlan(
        addresses, secure, users, args.tabs, args.rate, args.seconds, args.agent, workers
    )
