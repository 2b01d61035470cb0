"""The whole cluster on this machine, through real processes and real WebSockets.

    python -m tests.load.bench_cluster [--quick] [--only NAME ...]

Starts clusters of its own (`steward up`) on free ports and temporary data, with agents that
only emit, and measures from outside, the load client in one more process of the same
machine. Every event's sequence is checked while it is measured. Users are new in each round.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from steward.testing.local_cluster import LocalCluster
from tests.load.measures import Numbers, measure
from tests.load.rows import Row, text_table

HERE = Path(__file__).parent
AGENTS = [f"--agent={HERE / 'agents.py'}:{name}" for name in ("echo", "burst", "paced")]

USERS, TABS = 50, 2
RATE = 1000
FAILOVER_USERS = 20


class Bench:
    """Starts clusters and runs measurements on them, round by round."""

    def __init__(self, folder: Path, rounds: int, quick: bool) -> None:
        self._folder = folder
        self.rounds_wanted = rounds
        self.quick = quick
        self._started = 0
        self.ready_s: list[float] = []
        self.stop_s: list[float] = []
        self.cluster = self.start()

    def start(self) -> LocalCluster:
        """A new cluster on new data; how long it took is noted."""
        self._started += 1
        directory = self._folder / str(self._started)
        directory.mkdir()
        began = time.monotonic()
        cluster = LocalCluster.start(directory, *AGENTS)
        try:
            cluster.wait_ready()
        except BaseException:
            cluster.end()
            raise
        self.ready_s.append(time.monotonic() - began)
        return cluster

    def stop(self) -> None:
        """Stop the cluster as Ctrl-C does; how long it took is noted."""
        began = time.monotonic()
        self.cluster.stop()
        self.stop_s.append(time.monotonic() - began)

    def restart(self) -> None:
        """Stop it, and start another."""
        self.stop()
        self.cluster = self.start()

    def sized(self, whole: int, quick: int) -> int:
        """How much of something is measured."""
        return quick if self.quick else whole

    def rounds(self, name: str, label: str = "", **options: int) -> list[Numbers]:
        """A measurement, several times, each with users of its own."""
        return [
            self.once(name, f"{label or name}{number}", **options)
            for number in range(self.rounds_wanted)
        ]

    def once(self, name: str, label: str, **options: int) -> Numbers:
        """One round of a measurement, in a process of its own."""
        print(f"{label} {options}", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as client:
            data = str(self.cluster.data)
            return client.submit(measure, data, label, name, options).result()


def memory(bench: Bench) -> Iterator[Row]:
    """What an idle connection costs each process. One round: what is freed is not given back."""
    connections = bench.sized(1000, 200)
    found = [bench.once("memory", "memory", connections=connections)]
    what = f"{connections:,} idle connections, a user each"
    yield Row(f"{what}: edge, per connection", "KiB", _each(found, "kib_edge-0"), 8.0, True)
    for name in _processes(found[0], "kib_node"):
        label = f"{what}: {name} (half of the users)"
        yield Row(label, "KiB", _each(found, f"kib_{name}"), lower_is_better=True)
    yield Row(f"{what}: connects to `ready`", "/s", _each(found, "connects"))
    names = [name for name in _processes(found[0], "cpu_") if name != "client"]
    each = [sum(found[0][f"cpu_{name}"] for name in names) / 1000]
    yield Row(f"{what}: CPU per connect, whole cluster", "ms", each, lower_is_better=True)


def idle(bench: Bench) -> Iterator[Row]:
    """One message at a time."""
    found = bench.rounds("idle", messages=bench.sized(200, 20))
    for name, what, goal in (
        ("accepted", "message to `accepted`", None),
        ("first", "message to its first event", 50.0),
        ("started", "message to `agent_started`", None),
        ("completed", "message to `agent_completed`, agent `echo`", None),
    ):
        yield Row(f"idle: {what}, p50", "ms", _each(found, f"{name}_p50"), goal, True)
        yield Row(f"idle: {what}, p99", "ms", _each(found, f"{name}_p99"), None, True)


def latency(bench: Bench) -> Iterator[Row]:
    """A low rate that leaves the machine idle most of the time."""
    seconds = bench.sized(4, 1)
    found = bench.rounds("latency", users=USERS, tabs=TABS, rate=RATE, seconds=seconds)
    what = f"at {RATE:,} events/s: verb to socket"
    yield Row(f"{what}, p50", "ms", _each(found, "p50"), 2.5, True)
    yield Row(f"{what}, p99", "ms", _each(found, "p99"), 10.0, True)
    yield Row(f"{what}, worst", "ms", _each(found, "worst"), None, True)
    yield from _cpu(f"at {RATE:,} events/s: CPU per event", found)


def throughput(bench: Bench) -> Iterator[Row]:
    """As fast as the agents can."""
    events = bench.sized(1500, 200)
    bench.once("throughput", "warm", users=USERS, tabs=TABS, events=events // 4)
    found = bench.rounds("throughput", users=USERS, tabs=TABS, events=events)
    what = f"{USERS} users, {TABS} tabs each"
    yield Row(f"most durable events, {what}", "/s", _each(found, "rate"), 25_000)
    yield from _cpu("at most: CPU per event", found)
    alone = bench.sized(4000, 1000)
    found = bench.rounds("throughput", "alone", users=1, tabs=1, events=alone)
    yield Row("most durable events, one user alone", "/s", _each(found, "rate"))


def failover(bench: Bench) -> Iterator[Row]:
    """SIGKILL of the node that has most of the users."""
    found = []
    for number in range(bench.rounds_wanted):
        bench.cluster.wait_healed()
        found.append(bench.once("failover", f"failover{number}", users=FAILOVER_USERS))
    what = "node killed: until its users hear the next manager"
    yield Row(f"{what}, median user", "ms", _each(found, "median"), None, True)
    yield Row(f"{what}, last user", "ms", _each(found, "worst"), 1000, True)


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    part.__name__: part for part in (memory, idle, latency, throughput, failover)
}


def figures(rounds: int, quick: bool, only: Sequence[str] = ()) -> list[Row]:
    """All parts, or those in `only`."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="steward-bench-") as folder:
        bench = Bench(Path(folder), rounds, quick)
        try:
            for _ in range(0 if only else rounds - 1):
                bench.restart()
            for name, part in PARTS.items():
                if not only or name in only:
                    rows.extend(part(bench))
            bench.stop()
        except BaseException:
            sys.stderr.write(bench.cluster.logs())
            raise
        finally:
            bench.cluster.end()
    return [
        Row("`steward up` to ready", "s", bench.ready_s, 5.0, True),
        Row("Ctrl-C to its end", "s", bench.stop_s, None, True),
        *rows,
    ]


def _each(found: Sequence[Numbers], name: str) -> list[float]:
    return [numbers[name] for numbers in found]


def _processes(numbers: Numbers, prefix: str) -> list[str]:
    kind = prefix.partition("_")[0] + "_"
    return sorted(name.removeprefix(kind) for name in numbers if name.startswith(prefix))


def _cpu(what: str, found: Sequence[Numbers]) -> Iterator[Row]:
    """CPU of each role, nodes taken together, and of all without the client."""
    names = _processes(found[0], "cpu_")
    roles = {"nodes": "node", "log": "log", "edge": "edge", "registry": "registry"}
    for label, role in roles.items():
        members = [name for name in names if name.startswith(role)]
        values = [sum(numbers[f"cpu_{name}"] for name in members) for numbers in found]
        yield Row(f"{what}, {label}", "µs", values, lower_is_better=True)
    own = [name for name in names if name != "client"]
    values = [sum(numbers[f"cpu_{name}"] for name in own) for numbers in found]
    yield Row(f"{what}, whole cluster", "µs", values, lower_is_better=True)
    client = _each(found, "cpu_client")
    yield Row(f"{what}, the load client beside it", "µs", client, lower_is_better=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.bench_cluster", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=(), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="one short round")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    print(text_table(figures(rounds, options.quick, options.only)))


if __name__ == "__main__":
    main()
