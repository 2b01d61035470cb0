"""What one slow client costs the others, and what merging costs and saves.

    python -m tests.load.slow_clients [--quick] [--rounds N]

Two real edges (`edge_rig`) side by side, with `CONNECTIONS` clients each at a steady rate, and one
more whose user streams a text. At the one edge that client reads everything; at the other, in
the same moments, it reads nothing (until the edge closes it with SLOW_CONSUMER), or a little
with `merge=1`. The edges change roles with every window. The same events flow at both: what
differs is who reads. Every sequence of every client is checked.

Figures: p99 from the making of an event to its arrival at the others, as a ratio of the two
edges. Once as the median over the fifths of a second, each to the same one at the other edge,
which whatever else the machine does can't move; and once of all events of a round. A window
has the whole life in it of a client that reads nothing, up to the close. And, in this
process, what connections cost that ask for merging (see `slow_costs`).
"""

import argparse
import asyncio
import gc
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import uvloop

from steward.load.wire import LoadSocket, connect
from tests.load import slow_costs
from tests.load.edge_rig import Rig
from tests.load.rows import Row, text_table
from tests.load.slow_reader import Pace, SlowReader

CONNECTIONS = 1000
CONNECTS_AT_ONCE = 32
RATE, SLOW_RATE = 2000, 3000
ARRIVAL_S = 10.0
SLICE_NS = 200_000_000
_AT = b'"at":'

READS = (Pace.ALL, False)
KINDS = {"stalled": (Pace.NOTHING, False), "merging": (Pace.LITTLE, True)}

Slices = dict[int, list[float]]
"""Times in ms by the fifth of a second in which the events were made."""


class SlowRig(Rig):
    """The rig with the paced stand."""

    STAND = "tests.load.slow_stand"


@dataclass
class Seen:
    """What one round has seen. `pairs`: times with a slow client, and without, of one slice."""

    pairs: dict[str, list[tuple[list[float], list[float]]]] = field(
        default_factory=lambda: {kind: [] for kind in KINDS}
    )
    closed: int = 0
    stalls: int = 0
    deltas: int = 0
    frames: int = 0

    def ratio(self, kind: str) -> float:
        """Of the p99 in the same moments: the median."""
        return statistics.median(p99(slow) / p99(other) for slow, other in self.pairs[kind])

    def whole_ratio(self, kind: str) -> float:
        """Of the p99 of all events."""
        slow, other = zip(*self.pairs[kind], strict=True)
        return p99([*chain.from_iterable(slow)]) / p99([*chain.from_iterable(other)])


class Crowd:
    """The clients that are not slow, and what their events took."""

    def __init__(self, sockets: list[LoadSocket]) -> None:
        self._sockets = sockets
        self._count = 0
        self._slices: Slices = defaultdict(list)
        for one in sockets:
            one.on_event = self._note

    def _note(self, text: bytes) -> None:
        at = text.rindex(_AT) + len(_AT)
        made = int(text[at : at + 19])
        self._slices[made // SLICE_NS].append((time.time_ns() - made) / 1e6)
        self._count += 1

    async def arrived(self, count: int) -> Slices:
        """Wait until so many events have come; their times. Slices that were cut are left out."""
        async with asyncio.timeout(ARRIVAL_S):
            while self._count < count:
                await asyncio.sleep(0.01)
        assert self._count == count, f"{self._count} of {count} events"
        slices, self._slices, self._count = self._slices, defaultdict(list), 0
        return {key: slices[key] for key in sorted(slices)[1:-1]}

    def close(self) -> None:
        for one in self._sockets:
            one.close()


def p99(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)]


class Side:
    """One edge with its crowd."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._windows = 0
        self.crowd = Crowd([])

    async def gather(self) -> None:
        """Connect the crowd."""
        limit = asyncio.Semaphore(CONNECTS_AT_ONCE)

        async def one(user: str, token: str) -> LoadSocket:
            async with limit:
                return await connect(f"127.0.0.1:{self._rig.port}", user, token)

        users = self._rig.tokens([f"user-{number}" for number in range(CONNECTIONS)])
        self.crowd = Crowd(await asyncio.gather(*(one(*each) for each in users)))

    async def window(self, how: tuple[Pace, bool], seconds: float, seen: Seen) -> Slices:
        """The slow client comes, the events flow, all is checked, it leaves."""
        pace, merge = how
        self._windows += 1
        ((user, token),) = self._rig.tokens([f"slow-{self._windows}"])
        reader = SlowReader(user, pace)
        await reader.open(self._rig.port, token, merge=merge)
        order = {"seconds": seconds, "rate": RATE, "slow": user, "slow_rate": SLOW_RATE}
        loop = asyncio.get_running_loop()
        paced: dict[str, Any] = await loop.run_in_executor(None, lambda: self._rig.ask(pace=order))
        slices = await self.crowd.arrived(paced["sent"])
        await reader.finish()
        if pace is Pace.NOTHING:
            seen.stalls += 1
            seen.closed += reader.closed_with == 4004
            return slices
        assert reader.sequence == paced["slow"], f"{reader.sequence} of {paced['slow']} deltas came"
        if merge:
            seen.deltas += reader.sequence
            seen.frames += reader.events
        else:
            assert reader.events == reader.sequence, "merged without need"
        return slices


async def pair(
    slow: Side, other: Side, how: tuple[Pace, bool], seconds: float, seen: Seen
) -> list[tuple[list[float], list[float]]]:
    """Both edges at the same time; the slices that both have."""
    gc.collect()
    gc.disable()
    try:
        found, base = await asyncio.gather(
            slow.window(how, seconds, seen), other.window(READS, seconds, seen)
        )
    finally:
        gc.enable()
    return [(found[key], base[key]) for key in sorted(found.keys() & base.keys())]


async def measure(rounds: int, cycles: int, seconds: float) -> list[Seen]:
    """In each of the `cycles` of a round each kind comes once at each edge."""
    found: list[Seen] = []
    with SlowRig() as one, SlowRig() as other:
        left, right = Side(one), Side(other)
        for side in (left, right):
            await side.gather()
        await pair(left, right, READS, 0.8, Seen())
        for _ in range(rounds):
            seen = Seen()
            for _ in range(cycles):
                for kind, how in KINDS.items():
                    seen.pairs[kind] += await pair(left, right, how, seconds, seen)
                    seen.pairs[kind] += await pair(right, left, how, seconds, seen)
            found.append(seen)
        for side in (left, right):
            side.crowd.close()
        one.check()
        other.check()
    return found


def figures(rounds: int, quick: bool) -> list[Row]:
    """The rows of this module."""
    seconds, cycles = (1.4, 1) if quick else (1.6, 2)
    found = uvloop.run(measure(rounds, cycles, seconds))
    rows = []
    for kind, does in (("stalled", "reads nothing"), ("merging", "reads slowly with merge=1")):
        what = f"p99 of {CONNECTIONS:,} clients while one more {does}, to one that reads all"
        rows.append(Row(what, "x", [seen.ratio(kind) for seen in found], 1.10, True))
        rows.append(
            Row(f"{what}: all events", "x", [seen.whole_ratio(kind) for seen in found], None, True)
        )
    return [
        *rows,
        Row(
            "deltas in one event of the client that reads slowly with merge=1",
            "",
            [seen.deltas / seen.frames for seen in found],
        ),
        Row(
            "clients that read nothing closed with SLOW_CONSUMER",
            "%",
            [100 * seen.closed / seen.stalls for seen in found],
        ),
        *slow_costs.figures(rounds, quick),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.slow_clients", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="short windows")
    options = parser.parse_args()
    print(text_table(figures(1 if options.quick else options.rounds, options.quick)))


if __name__ == "__main__":
    main()
