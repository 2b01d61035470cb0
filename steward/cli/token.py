"""`steward token`: make a token for a user, with the key of the data directory.

Prints the token and a newline, nothing else. Needs no running cluster; makes the key when
there is none yet, and no other state. Whoever can read the key can be any user.
"""

import argparse
import sys

from steward.cli.layout import data_path
from steward.model.keys import DEFAULT_TENANT, UserKey

DEFAULT_TTL_S = 3600


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "token", help="make a token for a user", description="Print a token for a user."
    )
    parser.add_argument("--data", type=data_path, default=".steward", metavar="DIR")
    parser.add_argument("--user", required=True, metavar="U", help="the user's id")
    parser.add_argument("--tenant", default=DEFAULT_TENANT, metavar="T", help="(default)")
    parser.add_argument(
        "--ttl", type=int, default=DEFAULT_TTL_S, metavar="S", help="seconds of life (3600)"
    )
    parser.add_argument(
        "--scope",
        action="append",
        default=[],
        metavar="S",
        help="what the token may be used for; repeatable, or separated by spaces",
    )


def run(args: argparse.Namespace) -> int:
    """Print the token; 2 when it can't be made like this."""
    from steward.rpc.keys import USER_KEY, KeyUnusable, load_or_create_key
    from steward.tokens import mint

    scopes = tuple(scope for given in args.scope for scope in given.split())
    try:
        key = load_or_create_key(args.data, USER_KEY)
        token = mint(key, UserKey(args.tenant, args.user), args.ttl, scopes)
    except (KeyUnusable, ValueError) as error:
        print(f"steward: {error}", file=sys.stderr)
        return 2
    print(token)
    return 0
