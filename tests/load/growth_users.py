"""What an event costs when a node has many users: CPU per event at 100, 1,000 and 10,000 of them.

    .venv/bin/python -m tests.load.growth_users [--rounds 3] [--quick]

A cluster for each number of users, of one node and one edge, side by side. Everybody is
connected and has an open run that emits at a period, so that the events of all come to `RATE` a
second in each cluster: the same events, over more users. The clusters take turns of some
seconds, so that what else this machine does meets all of them. The cost is CPU of all
processes of a cluster over the events that arrived in its turn, each of them checked; what
connections cost that wait (heartbeats) is in it. The figure is the ratio to 100 users. Also
what each process grew by per user. Quick: 100 and 1,000 users.
"""

import asyncio
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import uvloop

from steward.load.wire import LoadSocket
from steward.testing.local_cluster import LocalCluster
from tests.load.alone import run_alone
from tests.load.growth_agents import TURN_S, turn_of
from tests.load.machine import cpu_by_name, memory_by_name
from tests.load.measures import Load
from tests.load.rows import Row

AGENT = f"{Path(__file__).parent / 'growth_agents.py'}:metronome"
LEVELS, LEVELS_QUICK = (100, 1_000, 10_000), (100, 500)
FIRST = 100
RATE = 1_000
EDGE_OF_TURN_S = 0.25
AT_ONCE = 16
START_S = 90.0
GOAL = 1.2


class Side:
    """One cluster and its users."""

    def __init__(self, cluster: LocalCluster, users: int) -> None:
        self.users = users
        self.costs: dict[str, list[float]] = {}
        self.growth: dict[str, float] = {}
        self._load = Load(cluster.data, "growth")
        self._pids = {name: pid for name, pid in self._load.pids.items() if name != "client"}
        self._sockets: list[LoadSocket] = []

    async def connect(self) -> None:
        """Connect all; what processes grow by is noted, without what the first ones cost."""
        self._sockets = await self._load.tabs(FIRST, prefix="first")
        before = memory_by_name(self._pids)
        more = self.users - FIRST
        self._sockets += await self._load.tabs(more)
        for name, kib in memory_by_name(self._pids).items() if more else ():
            self.growth[name] = (kib - before[name]) / more

    async def run(self, turn: int, turns: int) -> None:
        """Start the runs. They emit when it is their turn."""
        period_ms = self.users * 1000 // RATE
        limit = asyncio.Semaphore(AT_ONCE)

        async def start(number: int, socket: LoadSocket) -> None:
            async with limit:
                phase_ms = number * period_ms // self.users
                self._load.send(socket, f"{period_ms} {phase_ms} {turn} {turns}", "metronome")
                await socket.frame("accepted", START_S)

        await asyncio.gather(*(start(*each) for each in enumerate(self._sockets)))

    async def measure(self, turn: int, turns: int) -> None:
        """Wait for the turn, and note microseconds of CPU per event in it."""
        now = time.monotonic()
        ahead = (turn - turn_of(now, turns)) % turns or turns
        begin = (now // TURN_S + ahead) * TURN_S + EDGE_OF_TURN_S
        await asyncio.sleep(begin - now)
        events, before, began = self._events(), cpu_by_name(self._pids), time.monotonic()
        await asyncio.sleep(TURN_S - 2 * EDGE_OF_TURN_S)
        after, events = cpu_by_name(self._pids), self._events() - events
        assert events, "nothing arrived"
        each = {name: (after[name] - before[name]) / events * 1e6 for name in self._pids}
        each["all"] = sum(each.values())
        each["rate"] = events / (time.monotonic() - began)
        for name, value in each.items():
            self.costs.setdefault(name, []).append(value)

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()

    def _events(self) -> int:
        return sum(socket.events for socket in self._sockets)


async def _measure(sides: list[Side], rounds: int) -> None:
    turns = len(sides)
    try:
        for turn, side in enumerate(sides):
            await side.connect()
            await side.run(turn, turns)
        for _ in range(rounds):
            for turn, side in enumerate(sides):
                await side.measure(turn, turns)
    finally:
        for side in sides:
            side.close()


def figures(rounds: int, quick: bool) -> list[Row]:
    """Rows for `make bench`."""
    levels = LEVELS_QUICK if quick else LEVELS
    with ExitStack() as stack:
        clusters: list[LocalCluster] = []
        for _ in levels:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="steward-growth-"))
            cluster = LocalCluster.start(Path(folder), "--agents", "1", "--agent", AGENT)
            stack.callback(cluster.end)
            clusters.append(cluster)
        sides = [
            Side(cluster.wait_ready(), users)
            for cluster, users in zip(clusters, levels, strict=True)
        ]
        uvloop.run(_measure(sides, rounds))
    return [*_ratios(sides), *_costs(sides), *_memory(sides[-1])]


def _ratios(sides: list[Side]) -> list[Row]:
    few = sides[0]
    rows: list[Row] = []
    for side in sides[1:]:
        pairs = zip(side.costs["all"], few.costs["all"], strict=True)
        what = f"CPU per event: {side.users:,} users on a node to {few.users}"
        rows.append(Row(what, "times", [one / other for one, other in pairs], GOAL, True))
    return rows


def _costs(sides: list[Side]) -> list[Row]:
    rows: list[Row] = []
    for side in sides:
        what = f"{side.users:,} users on a node, {RATE:,} events/s"
        rows.append(Row(f"{what}: arrived", "/s", side.costs.pop("rate")))
        rows += [
            Row(f"{what}: CPU per event, {name}", "µs", values)
            for name, values in sorted(side.costs.items())
            if max(values) > 5
        ]
    return rows


def _memory(side: Side) -> list[Row]:
    return [
        Row(f"{side.users:,} attached users: {name}, per user", "KiB", [value])
        for name, value in sorted(side.growth.items())
        if value > 0.05
    ]


if __name__ == "__main__":
    run_alone(figures, __doc__)
