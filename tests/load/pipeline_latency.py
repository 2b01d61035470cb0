"""From an agent's verb to a client's socket, durable in between: how long, and at what cost.

    .venv/bin/python -m tests.load.pipeline_latency [--rounds 3] [--quick]

One cluster of real processes (two nodes, a log with synchronous=FULL, one edge); the load client
is one more process of the same machine, and checks the sequence of every event on every socket.
At a fixed rate, time is counted from the call of the verb (`time.time_ns` inside the event) to
the read of the frame, and CPU over the same seconds, which begin when all runs have begun and
gone on for a while. At most: every agent emits as fast as its verbs return. Every guarantee is
on: fence, expected sequence, append before delivery, user and epoch checks.
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import uvloop

from steward.testing.local_cluster import LocalCluster
from tests.load.alone import run_alone
from tests.load.machine import cpu_by_name
from tests.load.measures import Load, Numbers, measure, percentiles
from tests.load.rows import Row

AGENTS = Path(__file__).parent / "agents.py"
LEAD_S = 1.0
RUN_S = 120.0
ROLES = {"nodes": "node", "log": "log", "edge": "edge"}


@dataclass(frozen=True, slots=True)
class Pace:
    """A rate over so many users, and what has to be reached at it, in ms."""

    rate: int
    users: int
    tabs: int
    p50_ms: float | None
    p99_ms: float


PACES = (Pace(1_000, 50, 2, 2.5, 10.0), Pace(10_000, 500, 1, None, 12.0))
MOST_USERS, MOST_GOAL = 500, 25_000.0


async def steady(load: Load, users: int, tabs: int, rate: int, seconds: int) -> Numbers:
    """A fixed rate, once it goes on: ms from verb to socket, and CPU of each process per event."""
    sockets = await load.tabs(users, tabs)
    first = sockets[::tabs]
    times: list[float] = []
    counting = False

    def note(text: bytes) -> None:
        if counting and text.startswith(b'{"type":"custom"'):
            at = text.rindex(b'"at":') + 5
            times.append((time.time_ns() - int(text[at : at + 19])) / 1e6)

    each = rate // users
    for number, socket in enumerate(first):
        phase_ms = 500 + number * 1000 // rate
        load.send(socket, f"{int(each * (seconds + 2 * LEAD_S))} {each} {phase_ms}", "paced")
    for socket in sockets:
        socket.on_event = note
    await asyncio.gather(*(socket.frame("accepted") for socket in first))
    await asyncio.sleep(LEAD_S)
    pids = load.pids
    counting, began, before = True, time.perf_counter(), cpu_by_name(pids)
    events = sum(socket.events for socket in first)
    await asyncio.sleep(seconds)
    events = sum(socket.events for socket in first) - events
    counting, took, after = False, time.perf_counter() - began, cpu_by_name(pids)
    await asyncio.gather(*(socket.until_runs_ended(1, RUN_S) for socket in sockets))
    for socket in sockets:
        socket.close()
    p50, p99 = percentiles(times)
    return {"p50": p50, "p99": p99, "rate": events / took} | {
        f"cpu_{name}": (after[name] - before[name]) / events * 1e6 for name in pids
    }


def _steady(data: str, label: str, options: dict[str, int]) -> Numbers:
    return uvloop.run(steady(Load(Path(data), label), **options))


class Found:
    """What was measured, round by round."""

    def __init__(self) -> None:
        self.paced: dict[int, list[Numbers]] = {pace.rate: [] for pace in PACES}
        self.most: list[Numbers] = []
        self.alone: list[Numbers] = []

    def measure(self, data: str, number: int, quick: bool) -> None:
        """One round of everything, with users of its own, in a process of its own."""
        seconds, events, single = (1, 60, 2_000) if quick else (4, 200, 8_000)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as client:
            for pace in PACES:
                wanted = {"users": pace.users, "tabs": pace.tabs, "rate": pace.rate}
                label = f"at{pace.rate}-{number}"
                job = client.submit(_steady, data, label, wanted | {"seconds": seconds})
                self.paced[pace.rate].append(job.result())
            for name, users, each, into in (
                ("most", MOST_USERS, events, self.most),
                ("alone", 1, single, self.alone),
            ):
                wanted = {"users": users, "tabs": 1, "events": each}
                job = client.submit(measure, data, f"{name}{number}", "throughput", wanted)
                into.append(job.result())


def figures(rounds: int, quick: bool) -> list[Row]:
    """Rows for `make bench`."""
    found = Found()
    with tempfile.TemporaryDirectory(prefix="steward-pipeline-") as folder:
        options = [f"--agent={AGENTS}:{name}" for name in ("burst", "paced")]
        cluster = LocalCluster.start(Path(folder), *options)
        try:
            cluster.wait_ready()
            for number in range(rounds):
                found.measure(str(cluster.data), number, quick)
        except BaseException:
            print(cluster.logs(), file=sys.stderr)
            raise
        finally:
            cluster.end()
    return list(_rows(found))


def _rows(found: Found) -> Iterator[Row]:
    for pace in PACES:
        paced = found.paced[pace.rate]
        at = f"at {pace.rate:,} events/s"
        what = f"{at}, {pace.users} users: verb to socket"
        yield Row(f"{what}, p50", "ms", _each(paced, "p50"), pace.p50_ms, True)
        yield Row(f"{what}, p99", "ms", _each(paced, "p99"), pace.p99_ms, True)
        # A machine that is full is late, and then offers less.
        yield Row(f"{at}: arrived", "/s", _each(paced, "rate"), 0.95 * pace.rate)
        yield from _cpu(f"{at}: CPU per event", paced)
    yield Row(f"most events, {MOST_USERS} users", "/s", _each(found.most, "rate"), MOST_GOAL)
    yield from _cpu("at most: CPU per event", found.most)
    yield Row("most events, one user alone", "/s", _each(found.alone, "rate"))


def _cpu(what: str, found: Sequence[Numbers]) -> Iterator[Row]:
    """CPU of each role, of all without the client, and of the client."""
    names = [name for name in found[0] if name.startswith("cpu_")]
    for label, role in ROLES.items():
        mine = [name for name in names if name.startswith(f"cpu_{role}")]
        values = [sum(numbers[name] for name in mine) for numbers in found]
        yield Row(f"{what}, {label}", "µs", values, lower_is_better=True)
    own = [name for name in names if name != "cpu_client"]
    values = [sum(numbers[name] for name in own) for numbers in found]
    yield Row(f"{what}, whole cluster", "µs", values, lower_is_better=True)
    client = _each(found, "cpu_client")
    yield Row(f"{what}, the load client beside it", "µs", client, lower_is_better=True)


def _each(found: Sequence[Numbers], name: str) -> list[float]:
    return [numbers[name] for numbers in found]


if __name__ == "__main__":
    run_alone(figures, __doc__)
