"""`make bench`: how fast this machine is, through real processes and real WebSockets.

    python -m tests.load.bench [--rounds 3] [--only NAME ...] [--write]

Starts clusters of its own (`steward up`) on free ports and temporary data, with agents that
only emit, and measures from outside, the load client in one more process of the same
machine. Every event's sequence is checked while it is measured. Each figure is the
median of several rounds, with the least and the greatest. Progress goes to stderr, one
table to stdout; `--write` also puts it into docs/performance.md. Asserts nothing about speed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from steward.testing.local_cluster import LocalCluster
from tests.load import machine
from tests.load.measures import Numbers, measure

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- figures: written by make bench -->", "<!-- end of figures -->"
AGENTS = [f"--agent={HERE / 'agents.py'}:{name}" for name in ("echo", "burst", "paced")]

MESSAGES = 200
USERS, TABS, EVENTS = 50, 2, 1500
ALONE_EVENTS = 4000
RATE, RATE_S = 1000, 4
CONNECTIONS = 1000
FAILOVER_USERS = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: `values` are those of the rounds."""

    what: str
    unit: str
    values: Sequence[float]

    def cells(self) -> tuple[str, str, str]:
        low, high = min(self.values), max(self.values)
        spread = f"{_number(low)} to {_number(high)}" if len(self.values) > 1 else ""
        return self.what, f"{_number(statistics.median(self.values))} {self.unit}", spread


class Bench:
    """Starts clusters and runs measurements on them, round by round."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self._folder = folder
        self.rounds_wanted = rounds
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
        self.stop()
        self.cluster = self.start()

    def rounds(self, name: str, **options: int) -> list[Numbers]:
        """A measurement, several times, each with users of its own."""
        return [
            self.once(name, f"{name}{number}", **options) for number in range(self.rounds_wanted)
        ]

    def once(self, name: str, label: str, **options: int) -> Numbers:
        """One round of a measurement, in a process of its own."""
        _say(f"{label} {options}")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as client:
            data = str(self.cluster.data)
            return client.submit(measure, data, label, name, options).result()


def idle(bench: Bench) -> Iterator[Row]:
    found = bench.rounds("idle", messages=MESSAGES)
    for name, what in (
        ("accepted", "message to `accepted`"),
        ("first", "message to its first event"),
        ("started", "message to `agent_started`"),
        ("completed", "message to `agent_completed`, agent `echo`"),
    ):
        yield Row(f"idle: {what}, p50", "ms", _each(found, f"{name}_p50"))
        yield Row(f"idle: {what}, p99", "ms", _each(found, f"{name}_p99"))


def throughput(bench: Bench) -> Iterator[Row]:
    bench.once("throughput", "warm", users=USERS, tabs=TABS, events=EVENTS // 5)
    found = bench.rounds("throughput", users=USERS, tabs=TABS, events=EVENTS)
    what = f"{USERS} users, {TABS} tabs each"
    yield Row(f"most durable events, {what}", "/s", _each(found, "rate"))
    yield from _cpu("at most: CPU per event", found)
    found = [
        bench.once("throughput", f"alone{number}", users=1, tabs=1, events=ALONE_EVENTS)
        for number in range(len(found))
    ]
    yield Row("most durable events, one user alone", "/s", _each(found, "rate"))


def latency(bench: Bench) -> Iterator[Row]:
    found = bench.rounds("latency", users=USERS, tabs=TABS, rate=RATE, seconds=RATE_S)
    what = f"at {RATE:,} events/s: verb to socket"
    yield Row(f"{what}, p50", "ms", _each(found, "p50"))
    yield Row(f"{what}, p99", "ms", _each(found, "p99"))
    yield Row(f"{what}, worst", "ms", _each(found, "worst"))
    yield from _cpu(f"at {RATE:,} events/s: CPU per event", found)


def failover(bench: Bench) -> Iterator[Row]:
    found = []
    for number in range(bench.rounds_wanted):
        bench.cluster.wait_healed()
        found.append(bench.once("failover", f"failover{number}", users=FAILOVER_USERS))
    what = "node killed: until its users hear the next manager"
    yield Row(f"{what}, median user", "ms", _each(found, "median"))
    yield Row(f"{what}, last user", "ms", _each(found, "worst"))


def memory(bench: Bench) -> Iterator[Row]:
    found = [bench.once("memory", "memory", connections=CONNECTIONS)]
    what = f"{CONNECTIONS:,} idle connections, a user each"
    yield Row(f"{what}: edge, per connection", "KiB", _each(found, "kib_edge-0"))
    for name in _processes(found[0], "kib_node"):
        yield Row(f"{what}: {name} (half of the users)", "KiB", _each(found, f"kib_{name}"))
    yield Row(f"{what}: connects to `ready`", "/s", _each(found, "connects"))
    names = [name for name in _processes(found[0], "cpu_") if name != "client"]
    each = [sum(found[0][f"cpu_{name}"] for name in names) / 1000]
    yield Row(f"{what}: CPU per connect, whole cluster", "ms", each)


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    part.__name__: part for part in (memory, idle, latency, throughput, failover)
}


def main() -> None:
    """Parse the command line, measure, print, and write when asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each measurement (3)")
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), help="measure only these")
    parser.add_argument("--write", action="store_true", help="write the table to docs/")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write needs all measurements")
    began = time.monotonic()
    where = f"{machine.facts()}, load before the start {machine.load():.1f}"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="steward-bench-") as folder:
        _say("starting a cluster")
        bench = Bench(Path(folder), options.rounds)
        try:
            for _ in range(options.rounds - 1 if not options.only else 0):
                _say("starting it again")
                bench.restart()
            for name, part in PARTS.items():
                if not options.only or name in options.only:
                    rows.extend(part(bench))
            bench.stop()
        finally:
            bench.cluster.end()
        rows.insert(0, Row("`steward up` to ready", "s", bench.ready_s))
        rows.insert(1, Row("Ctrl-C to its end", "s", bench.stop_s))
    _say(f"{time.monotonic() - began:.0f} s in all\n")
    print(_text(where, rows))
    if options.write:
        _write(where, rows)


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
        yield Row(f"{what}, {label}", "µs", values)
    own = [name for name in names if name != "client"]
    values = [sum(numbers[f"cpu_{name}"] for name in own) for numbers in found]
    yield Row(f"{what}, whole cluster", "µs", values)
    yield Row(f"{what}, the load client beside it", "µs", _each(found, "cpu_client"))


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _text(where: str, rows: Sequence[Row]) -> str:
    cells = [row.cells() for row in rows]
    widths = [max(len(cell[column]) for cell in cells) for column in range(2)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}   {c}".rstrip() for a, b, c in cells]
    return "\n".join((where, "", *lines))


def _write(where: str, rows: Sequence[Row]) -> None:
    """Replace the figures of the page; the prose around them stays."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, behind = rest.partition(END)
    lines = [
        f"`make bench ARGS=--write`: {where}.",
        "",
        "| what | median | least to greatest |",
        "|---|---:|---|",
        *(f"| {what} | {value} | {spread} |" for what, value, spread in map(Row.cells, rows)),
    ]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{behind}")
    _say(f"written to {PAGE.relative_to(HERE.parents[1])}")


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
