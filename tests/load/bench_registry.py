"""What a registry process does on this machine, over one gRPC stream of one edge.

    .venv/bin/python -m tests.load.bench_registry [--rounds 3] [--quick]

A real process on SQLite, three sessions of nodes, one of an edge. New placements (durable),
resolves of placed users, what the process costs when nothing happens, its memory, and how long
5,000 users of a dead node wait for their new one, from the moment in which its death is reported.
CPU is that of the registry process: it moves less than the clock on a shared machine. Each round
begins with an empty store; `tests.load.registry_growth` measures large ones.
"""

import tempfile
import time
from collections import defaultdict
from pathlib import Path

import uvloop

from tests.load.alone import run_alone
from tests.load.machine import resident_kib
from tests.load.registry_stand import RegistryStand
from tests.load.rows import Row

USERS, USERS_QUICK = 100_000, 30_000
STORM = 5_000
IDLE_S, IDLE_QUICK_S = 5.0, 1.0

# What, its unit, the goal, whether less is better.
PLACED = ("new placements, durable", "/s", 15_000, False)
PLACED_LOOP = ("CPU of a new placement, event loop", "µs", None, True)
PLACED_CPU = ("CPU of a new placement, all threads", "µs", None, True)
RESOLVED = ("resolves of placed users", "/s", 40_000, False)
RESOLVED_CPU = ("CPU of a resolve, all threads", "µs", None, True)
MEMORY = ("memory of a placement", "bytes", 1_024, True)
IDLE = ("idle, of a core", "%", 5, True)
AGAIN = ("5,000 users of a dead node all placed again", "ms", 350, True)
AGAIN_LOOP = ("CPU of one of them, event loop", "µs", None, True)
AGAIN_CPU = ("CPU of one of them, all threads", "µs", None, True)
ORDER = (
    PLACED,
    PLACED_LOOP,
    PLACED_CPU,
    RESOLVED,
    RESOLVED_CPU,
    MEMORY,
    IDLE,
    AGAIN,
    AGAIN_LOOP,
    AGAIN_CPU,
)

Values = defaultdict[tuple[str, str, float | None, bool], list[float]]


async def measure(data: Path, users: int, idle_s: float, values: Values) -> None:
    """One round."""
    async with RegistryStand(data) as stand:
        pid = stand.process.pid
        await stand.resolve(range(users, users + 1))
        empty = resident_kib(pid)
        placed = await stand.resolve(range(users))
        values[PLACED].append(placed.per_second)
        values[PLACED_LOOP].append(placed.loop_us)
        values[PLACED_CPU].append(placed.cpu_us)
        values[MEMORY].append((resident_kib(pid) - empty) * 1024 / users)
        resolved = await stand.resolve(range(users))
        values[RESOLVED].append(resolved.per_second)
        values[RESOLVED_CPU].append(resolved.cpu_us)
        values[IDLE].append(100 * await stand.idle(idle_s))
        of_dead = [number for number, node in stand.nodes.items() if node == "node-0"][:STORM]
        assert len(of_dead) == STORM
        began = time.perf_counter()
        await stand.kill(0)
        killed_s = time.perf_counter() - began
        again = await stand.resolve(of_dead)
        values[AGAIN].append((killed_s + again.wall_s) * 1000)
        values[AGAIN_LOOP].append(again.loop_us)
        values[AGAIN_CPU].append(again.cpu_us)
        assert not any(stand.nodes[number] == "node-0" for number in of_dead)


def figures(rounds: int, quick: bool) -> list[Row]:
    """The rows of this benchmark. Each round begins with an empty store.

    Quick: 30,000 users instead of 100,000, shorter idling.
    """
    values: Values = defaultdict(list)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            users, idle_s = (USERS_QUICK, IDLE_QUICK_S) if quick else (USERS, IDLE_S)
            uvloop.run(measure(Path(folder), users, idle_s, values))
    return [
        Row(what, unit, values[what, unit, goal, less], goal, less)
        for what, unit, goal, less in ORDER
    ]


if __name__ == "__main__":
    run_alone(figures, __doc__)
