"""Runs SPIN on `ownership.pml` and compares every result with the expected one.

With all guards on, the whole state space of several configurations is searched, and no invariant
may break. With a guard taken away, SPIN must find the expected broken invariant; that search is
breadth-first, so what is printed is a shortest way there. Nothing is approximated: states are
stored whole (no bit-state hashing, no hash compaction), and a search that hits its limit of memory,
depth or time is a failure, not a success.

Exit code 0: every result is as expected. 1: some result differs. 2: SPIN or a compiler is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).with_name("ownership.pml")
COMPILERS = ("gcc", "cc", "clang")
HOLDS = "holds"
REACHED = "reached"
DEPTH = 100_000
MEMORY_MB = 2_000
TIMEOUT_S = 600
ACTORS = ("node", "registry", "store", "log", "edge")


@dataclass(frozen=True, slots=True)
class Check:
    """One run of SPIN. `expected` is HOLDS, REACHED, or the invariant that must break."""

    name: str
    expected: str
    flags: str

    @property
    def breadth_first(self) -> bool:
        """For a shortest way; what is only to be reached lies too deep, and any way will do."""
        return self.expected not in (HOLDS, REACHED)


@dataclass(frozen=True, slots=True)
class Result:
    """What a run found: HOLDS, REACHED, a broken invariant, or why there is no result."""

    found: str
    states: str = ""
    depth: str = ""
    memory_mb: str = ""
    seconds: float = 0.0
    trail: tuple[str, ...] = ()


SMALL = "-DINCARNATIONS=2 -DEVENTS=2"

CHECKS = (
    # All guards on.
    Check("crashes: 3 events", HOLDS, "-DINCARNATIONS=3 -DEVENTS=3"),
    Check("crashes: 4 incarnations", HOLDS, "-DINCARNATIONS=4 -DEVENTS=2"),
    Check("lost and late messages", HOLDS, "-DINCARNATIONS=3 -DEVENTS=2 -DLOSS -DLATE"),
    Check("tools and timers", HOLDS, f"{SMALL} -DTOOLS -DTIMERS -DLOSS -DLATE"),
    Check("moves and releases", HOLDS, f"{SMALL} -DMOVES -DRELEASES"),
    Check("the same with crashes", HOLDS, "-DINCARNATIONS=3 -DEVENTS=1 -DMOVES -DRELEASES"),
    Check("two registry replicas", HOLDS, "-DREPLICAS=2 -DINCARNATIONS=3 -DEVENTS=1"),
    Check(
        "the same, moves and releases",
        HOLDS,
        "-DREPLICAS=2 -DINCARNATIONS=2 -DEVENTS=1 -DMOVES -DRELEASES",
    ),
    Check("restore of an old backup", HOLDS, "-DRESTORE -DINCARNATIONS=3 -DEVENTS=2"),
    Check("the same, late releases", HOLDS, "-DRESTORE -DINCARNATIONS=3 -DEVENTS=1 -DRELEASES"),
    # The model isn't empty: what should happen can happen.
    Check("each of 3 epochs writes", REACHED, "-DREACH=1"),
    Check("a zombie is refused", REACHED, "-DREACH=2"),
    Check("epoch 3 starts a tool", REACHED, "-DREACH=3 -DTOOLS -DEVENTS=1"),
    Check("all is shown, by epoch 3", REACHED, "-DREACH=4"),
    Check("a planned move", REACHED, f"{SMALL} -DREACH=5 -DMOVES"),
    # One guard off.
    Check("no FENCE", "S", f"{SMALL} -DNO_FENCE"),
    Check("no EXPECTED", "I3", f"{SMALL} -DNO_EXPECTED -DLOSS"),
    Check("no ATOMIC_SEAL", "P8", f"{SMALL} -DNO_ATOMIC_SEAL"),
    Check("no APPEND_FIRST", "I4", f"{SMALL} -DNO_APPEND_FIRST"),
    Check("no INTENT_FIRST", "I6", f"{SMALL} -DNO_INTENT_FIRST -DTOOLS"),
    Check("no EDGE_EPOCH", "I5", f"{SMALL} -DNO_EDGE_EPOCH"),
    Check("no SELF_FENCE", "I9", f"{SMALL} -DNO_SELF_FENCE"),
    Check("no GUARDED_COMMIT", "I8", f"{SMALL} -DNO_GUARDED_COMMIT"),
    Check("no PLACEMENT_COMPARE", "I8", f"{SMALL} -DNO_PLACEMENT_COMPARE -DREPLICAS=2"),
    Check("no REREAD", "I8", f"{SMALL} -DNO_REREAD"),
    Check("no COMPARE_DELETE", "I8", f"{SMALL} -DNO_COMPARE_DELETE -DRELEASES -DMOVES"),
    Check("no MUTATION_EPOCH", "I10", f"{SMALL} -DNO_MUTATION_EPOCH -DTIMERS"),
    Check("no GENERATION", "I7", "-DNO_GENERATION -DRESTORE -DINCARNATIONS=3 -DEVENTS=2"),
    # Guards that another one covers, and what is left when both are off. "no I8": unchecked.
    Check(
        "no ATOMIC_SEAL, no P8",
        HOLDS,
        f"{SMALL} -DNO_ATOMIC_SEAL -DIGNORE_P8 -DLOSS -DLATE -DTOOLS",
    ),
    Check(
        "no ATOMIC_SEAL, EXPECTED",
        "I3",
        f"{SMALL} -DNO_ATOMIC_SEAL -DIGNORE_P8 -DNO_EXPECTED",
    ),
    Check("no LOG_HEAD", HOLDS, "-DNO_LOG_HEAD -DRESTORE -DINCARNATIONS=3 -DEVENTS=1"),
    Check("no FENCE, no S", "I1", f"{SMALL} -DNO_FENCE -DIGNORE_S"),
    Check("no ACTIVATION", HOLDS, f"{SMALL} -DNO_ACTIVATION -DLOSS -DLATE"),
    Check("no REREAD, no I8", "I2", f"{SMALL} -DNO_REREAD -DIGNORE_I8"),
    Check(
        "no REREAD, no I2 I8",
        HOLDS,
        f"{SMALL} -DNO_REREAD -DIGNORE_I2 -DIGNORE_I8 -DTOOLS",
    ),
    Check(
        "no REREAD, ACTIVATION, no I2 I8",
        "S",
        f"{SMALL} -DNO_REREAD -DNO_ACTIVATION -DIGNORE_I2 -DIGNORE_I8",
    ),
    # Only the number makes it safe: without these, all but the ignored invariants hold.
    Check(
        "no compare at the store, no I8",
        HOLDS,
        f"{SMALL} -DNO_GUARDED_COMMIT -DNO_PLACEMENT_COMPARE -DNO_COMPARE_DELETE"
        " -DIGNORE_I8 -DRELEASES",
    ),
    Check("no SELF_FENCE, no I9", HOLDS, f"{SMALL} -DNO_SELF_FENCE -DIGNORE_I9 -DTOOLS"),
    Check("no EDGE_EPOCH, no I5", HOLDS, f"{SMALL} -DNO_EDGE_EPOCH -DIGNORE_I5 -DLOSS"),
)


class Failed(Exception):
    """A tool did not do its part. The text says which, and what it said."""


def call(
    command: Sequence[str], folder: Path, *, timeout_s: float = TIMEOUT_S, ok: bool = True
) -> str:
    """Output of `command`. With `ok` an exit code other than 0 is `Failed`."""
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if ok and done.returncode != 0:
        raise Failed(f"{command[0]} ended with {done.returncode}: {done.stdout.strip()[-300:]}")
    return done.stdout


def run(check: Check, spin: str, compiler: str) -> Result:
    """Search once, in a folder of its own. What SPIN, compiler or time refuse is a result."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="steward-model-") as name:
        try:
            return _search(check, spin, compiler, Path(name), started)
        except subprocess.TimeoutExpired:
            return Result("out of time", seconds=time.monotonic() - started)
        except Failed as error:
            return Result(str(error), seconds=time.monotonic() - started)


def _search(check: Check, spin: str, compiler: str, folder: Path, started: float) -> Result:
    shutil.copy(MODEL, folder)
    flags = check.flags.split()
    call([spin, "-a", *flags, MODEL.name], folder)
    options = ["-w", "-DSAFETY", f"-DMEMLIM={MEMORY_MB}"]
    options += ["-O0", "-DBFS"] if check.breadth_first else ["-O1"]
    call([compiler, *options, "-o", "pan", "pan.c"], folder)
    # The verifier's exit code says nothing about errors: its print-out does.
    said = call([str(folder / "pan"), f"-m{DEPTH}", "-w22"], folder, ok=False)
    trail = _trail(spin, flags, folder) if "wrote " in said else ()
    return Result(
        _found(said, trail),
        states=_number(r"^\s*(\S+) states, stored", said),
        depth=_number(r"depth reached (\d+)", said),
        memory_mb=_number(r"^\s*([\d.]+)\s+total actual memory usage", said).partition(".")[0],
        seconds=time.monotonic() - started,
        trail=trail,
    )


def _found(said: str, trail: Sequence[str]) -> str:
    if trail:
        last = trail[-1]
        if last == "REACHED":
            return REACHED
        return last.removeprefix("BROKEN ") if last.startswith("BROKEN ") else f"error: {last}"
    if re.search(r"too small|out of memory|MEMLIM bound|aborted|not completed", said):
        return "search incomplete"
    return HOLDS if re.search(r"errors: 0$", said, re.MULTILINE) else "no result"


def _trail(spin: str, flags: Sequence[str], folder: Path) -> tuple[str, ...]:
    """The steps of the counter-example as the model tells them, without SPIN's own lines."""
    said = call([spin, "-t", "-T", *flags, MODEL.name], folder, ok=False)
    told = (line.strip() for line in said.splitlines())
    return tuple(
        line for line in told if line == "REACHED" or line.startswith(("BROKEN ", *ACTORS))
    )


def _number(pattern: str, said: str) -> str:
    found = re.search(pattern, said, re.MULTILINE)
    return found.group(1) if found else ""


LINE = "{:<3} {:<34} {:<10} {:<18} {:>10} {:>6} {:>6} {:>7}"
HEADER = LINE.format("", "check", "expected", "result", "states", "depth", "MB", "seconds")


def row(check: Check, result: Result) -> str:
    """The line of the table for one check."""
    return LINE.format(
        "ok" if result.found == check.expected else "NOT",
        check.name,
        _words(check.expected),
        _words(result.found),
        result.states,
        result.depth,
        result.memory_mb,
        f"{result.seconds:.1f}",
    )


def _words(found: str) -> str:
    return f"breaks {found}" if re.fullmatch(r"S|[PI]\d+", found) else found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check the model of ownership with SPIN.")
    parser.add_argument("--only", default="", help="checks whose name contains this text")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="at once")
    options = parser.parse_args(arguments)

    spin = shutil.which("spin")
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if spin is None or compiler is None:
        what = "SPIN (Debian package: spin)" if spin is None else "a C compiler (gcc)"
        print(f"model: NOT CHECKED: {what} is missing", file=sys.stderr)
        return 2
    chosen = [check for check in CHECKS if options.only in check.name]
    if not chosen:
        parser.error(f"no check is called like {options.only!r}")

    started = time.monotonic()
    rows: list[tuple[Check, Result]] = []
    print(HEADER)
    with ThreadPoolExecutor(max_workers=max(1, options.jobs)) as pool:
        results = pool.map(lambda check: run(check, spin, compiler), chosen)
        for check, result in zip(chosen, results, strict=True):
            rows.append((check, result))
            print(row(check, result), flush=True)
    for check, result in rows:
        if result.trail and result.found != REACHED:
            print(f"\n{check.name} ({check.flags}) breaks {result.found}:")
            print("\n".join(f"    {step}" for step in result.trail[:-1]))
    differing = [check.name for check, result in rows if result.found != check.expected]
    print(
        f"\n{len(rows)} checks in {time.monotonic() - started:.0f} s, "
        + (f"NOT as expected: {', '.join(differing)}" if differing else "all as expected")
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
