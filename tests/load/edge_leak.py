"""Does an edge keep anything of those who left? Many connects and disconnects, and its RSS.

    python -m tests.load.edge_leak [--count 200000]

Clients come in crowds of `CROWD`, each of another user, wait for their `ready`, get a pong,
and leave: every second one with a close frame, the others by a reset. The edge is the real
process behind real gRPC (`edge_rig`). Memory of the first quarter does not count: caches and
the allocator fill up. Fails (exit code 1) when the rest grew by more than `MOST_KIB`.
"""

import argparse
import sys
import time

from tests.load import machine
from tests.load.edge_clients import Clients
from tests.load.edge_rig import Rig
from tests.load.rows import Row, number

CROWD = 500
PING = b'{"type":"ping","t":1}'
USERS = 5_000
MOST_KIB = 4_096
LOOKS, LOOKS_QUICK = 20, 4
FORGOTTEN_S = 30.0


def figures(rounds: int, quick: bool) -> list[Row]:
    """One row: growth of RSS, without the first quarter."""
    count, looks = (2_000, LOOKS_QUICK) if quick else (200_000, LOOKS)
    sizes = churn(count, looks)
    return [
        Row(
            f"edge: RSS growth over {count:,} connects and disconnects, without the first quarter",
            "KiB",
            [grown(sizes)],
            goal=MOST_KIB,
            lower_is_better=True,
        )
    ]


def churn(count: int, looks: int = LOOKS, *, aloud: bool = False) -> list[int]:
    """Connect and disconnect `count` times; the edge's RSS in KiB, at up to `looks` moments."""
    sizes: list[int] = []
    with Rig() as rig, Clients(rig.port) as clients:
        tokens = rig.tokens([f"u{n}" for n in range(min(USERS, count))])
        done = 0
        while done < count:
            at = done % len(tokens)
            crowd = tokens[at : at + min(CROWD, count - done)]
            opened = clients.open(crowd)
            clients.ping(PING, 1)
            clients.leave(opened)
            done += len(opened)
            if done * looks >= count * (len(sizes) + 1):
                _forgotten(rig)
                sizes.append(rig.edge_kib())
                if aloud:
                    print(f"{done:>9,} connects  {sizes[-1]:>9,} KiB", flush=True)
        rig.check()
    return sizes


def _forgotten(rig: Rig) -> None:
    """Wait until the edge has let go of every user: what it keeps then is kept for good."""
    deadline = time.monotonic() + FORGOTTEN_S
    while rig.ask(ask=1)["attached"]:
        if time.monotonic() > deadline:
            raise AssertionError("the edge did not detach those who left")
        time.sleep(0.1)


def grown(sizes: list[int]) -> int:
    """KiB between the end of the first quarter and the end."""
    return sizes[-1] - sizes[len(sizes) // 4]


def main() -> None:
    """Measure, tell, and judge."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.edge_leak")
    parser.add_argument("--count", type=int, default=200_000, help="connects in all (200,000)")
    options = parser.parse_args()
    print(machine.facts())
    growth = grown(churn(options.count, aloud=True))
    each = growth * 1024 / (options.count * 3 / 4)
    print(f"grew by {growth:,} KiB after the first quarter: {number(each)} bytes per connect")
    sys.exit(growth > MOST_KIB)


if __name__ == "__main__":
    main()
