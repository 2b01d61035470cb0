"""`make bench`: how fast this machine is, part by part, and the page that says so.

    python -m tests.load.bench [--quick] [--rounds 3] [--only PART ...] [--write]

Each part is a module of this folder with `figures(rounds, quick) -> list[Row]`, run in a process
of its own, one after the other: two at once would measure each other. A part that fails or is
not there is in the table as not measured, and the exit code is 1. A goal that is missed, and a
row that a part could not measure here (a peer that is not installed), is said and no failure.
Progress goes to stderr, the tables to stdout; `--write` also puts them into docs/performance.md,
each in its place, with the plot. `--quick` is one short round of each, in less than three minutes
on an idle machine: to look, not to quote. What each part took is told at the end, with the CPU
time of its processes, which is the better measure on a machine that does something else too.
"""

import argparse
import importlib
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.load import machine
from tests.load.page import Section, show, write
from tests.load.rows import Row

ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Part:
    """One module, and what it is about."""

    module: str
    title: str


PARTS = (
    Part("bench_peers", "An edge beside what else there is"),
    Part("bench_cluster", "The whole cluster"),
    Part("pipeline_latency", "From verb to socket"),
    Part("bench_tracing", "Traces"),
    Part("bench_scrape", "Metrics"),
    Part("edge_capacity", "Many connections to one edge"),
    Part("edge_workers", "Several workers on one port"),
    Part("edge_leak", "Connections that come and go"),
    Part("bench_registry", "The registry"),
    Part("registry_growth", "More placements"),
    Part("slow_clients", "A stalled client among many"),
    Part("growth_users", "More users"),
    Part("growth_streams", "More stored streams"),
    Part("growth_replay", "Replay"),
    Part("bench_postgres", "The event log on PostgreSQL"),
    Part("etcd_placements", "The registry on etcd"),
)
"""Every module of this folder that has figures of its own, in the order of the page."""


def main() -> int:
    """Measure, print, and write when asked; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.bench", description=__doc__)
    names = [part.module for part in PARTS]
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"of each measurement ({ROUNDS})"
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="one short round of each")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if options.write and options.quick:
        parser.error("--quick is to look, not to write down")
    parts = [part for part in PARTS if not options.only or part.module in options.only]
    rounds = 1 if options.quick else options.rounds
    began = time.monotonic()
    sections = run(parts, rounds, options.quick)
    console = Console(stderr=True, highlight=False)
    show(sections)
    if options.write:
        write([part.title for part in PARTS], sections)
    rows = [row for section in sections for row in section.rows]
    for row in rows:
        if row.missing:
            console.print(f"NOT MEASURED {row.what}: {row.missing}", style="bold red", markup=False)
    missed = sum(row.reached is False for row in rows)
    absent = sum(bool(row.missing) for row in rows)
    took = time.monotonic() - began
    for part, section in zip(parts, sections, strict=True):
        times = f"{section.seconds:5.0f} s, {section.cpu_s:4.0f} s of CPU"
        console.print(f"{part.module:<18}{times}", markup=False)
    cpu_s = sum(section.cpu_s for section in sections)
    console.print(f"{took:.0f} s, {cpu_s:.0f} s of CPU")
    console.print(f"goals missed: {missed}; figures not measured: {absent}")
    return 1 if any(section.failed for section in sections) else 0


def run(parts: Sequence[Part], rounds: int, quick: bool) -> list[Section]:
    """Run the parts one after the other, under a progress bar."""
    sections = []
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    text = TextColumn("{task.description}")
    with (
        Progress(text, *columns, console=Console(stderr=True)) as progress,
        tempfile.TemporaryDirectory(prefix="steward-bench-") as folder,
    ):
        bar = progress.add_task("", total=len(parts))
        for part in parts:
            progress.update(bar, description=part.title)
            log = Path(folder) / f"{part.module}.log"
            sections.append(_run(part, rounds, quick, log))
            progress.console.print(f"{part.module}: {sections[-1].seconds:.0f} s", highlight=False)
            progress.advance(bar)
    return sections


def _run(part: Part, rounds: int, quick: bool, log: Path) -> Section:
    """The figures of one part; a row that says why, when there are none."""
    began = time.monotonic()
    where = f"{machine.facts()}; load before it {machine.load():.1f}; medians of {rounds}."
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            measured = process.submit(measure, part.module, rounds, quick, str(log)).result()
            rows, cpu_s = measured
            if not rows:
                said = _tail(log, 1).strip() or "it says nothing"
                rows = [Row(part.module, "", (), missing=said)]
            return Section(part.title, rows, where, time.monotonic() - began, cpu_s)
    except Exception as error:
        # Whatever ended it: the other parts are measured all the same, and the exit code says it.
        # `__cause__` is the traceback in the process of the part.
        sys.stderr.write(f"\n{part.module}:\n{_tail(log)}\n{error.__cause__ or ''}\n")
        why = str(error).strip().splitlines() or [""]
        row = Row(part.module, "", (), missing=f"{type(error).__name__}: {why[0]}")
        return Section(part.title, [row], where, time.monotonic() - began, failed=True)


def measure(module: str, rounds: int, quick: bool, log: str) -> tuple[list[Row], float]:
    """The process of a part: its rows, and CPU seconds. What all of it says goes to `log`."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    rows: list[Row] = importlib.import_module(f"tests.load.{module}").figures(rounds, quick)
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return rows, sum(each.ru_utime + each.ru_stime for each in used)


def _tail(log: Path, lines: int = 40) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
