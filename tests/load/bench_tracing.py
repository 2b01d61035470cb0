"""What traces cost: off, one message in a hundred, and all of them, in turns.

    .venv/bin/python -m tests.load.bench_tracing [--rounds 3] [--quick]

Three clusters of real processes, alike but for their settings of traces, and a real OTLP receiver.
Each round gives every cluster the same load in short slices, in turns: users send one message after
the other, and each run emits some events, to one socket. What counts is the CPU of all processes of
the cluster per event, with that of sending spans after the last one, and without what it uses when
nobody talks; a round is compared with the same round without traces, so that what the machine does
otherwise is in both. The load client acknowledges nothing, and is not counted.
"""

import asyncio
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import uvloop

from steward.testing.collector import span_collector
from steward.testing.local_cluster import LocalCluster
from tests.load.alone import run_alone
from tests.load.machine import cpu_by_name
from tests.load.measures import Load, Numbers
from tests.load.rows import Row

AGENTS = Path(__file__).parent / "agents.py"
ROLES = ("REGISTRY", "AUTH", "LOG", "AGENT", "EDGE")
RATIOS: dict[str, float | None] = {"off": None, "1 %": 0.01, "100 %": 1.0}
SLICES = 8
USERS, MESSAGES, EVENTS = 40, 6, 20
MOST_COST = 3.0
RUN_S = 120.0
AFTER_S = 1.0
"""In which the last spans of a slice are sent: processes collect them for half a second."""


async def talk(load: Load, users: int, messages: int, events: int) -> Numbers:
    """Events, the seconds that they took, and those of CPU of all processes but the client."""
    sockets = await load.tabs(users)

    async def one(number: int) -> None:
        socket = sockets[number]
        for done in range(messages):
            load.send(socket, str(events), "burst")
            await socket.until_runs_ended(done + 1, RUN_S)

    pids = {name: pid for name, pid in load.pids.items() if name != "client"}
    idle = cpu_by_name(pids)
    await asyncio.sleep(AFTER_S)
    before, began = cpu_by_name(pids), perf_counter()
    await asyncio.gather(*(one(number) for number in range(users)))
    took = perf_counter() - began
    await asyncio.sleep(AFTER_S)
    after = cpu_by_name(pids)
    total = sum(socket.events for socket in sockets)
    for socket in sockets:
        socket.close()
    used = sum(after[name] - 2 * before[name] + idle[name] for name in pids)
    return {"events": total, "took": took, "cpu": used}


def _talk(data: str, label: str, users: int, messages: int, events: int) -> Numbers:
    return uvloop.run(talk(Load(Path(data), label), users, messages, events))


def figures(rounds: int, quick: bool) -> list[Row]:
    """Rows for `make bench`."""
    slices = 1 if quick else SLICES
    found: dict[str, list[Numbers]] = {name: [] for name in RATIOS}
    spans: list[float] = []
    with ExitStack() as stack:
        collector, endpoint = stack.enter_context(span_collector())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steward-traces-")))
        clusters = {
            name: _start(stack, folder / str(number), ratio, endpoint)
            for number, (name, ratio) in enumerate(RATIOS.items())
        }
        client = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
        try:
            for number in range(-1, rounds):
                collector.received.clear()
                parts: dict[str, list[Numbers]] = {name: [] for name in RATIOS}
                for piece in range(slices if number >= 0 else 1):
                    # Not always in the same order.
                    for name in sorted(RATIOS, reverse=bool(piece % 2)):
                        data, label = str(clusters[name].data), f"round{number}-{piece}"
                        job = client.submit(_talk, data, label, USERS, MESSAGES, EVENTS)
                        parts[name].append(job.result())
                if number < 0:
                    continue  # That was to warm up.
                spans.append(float(len(collector.spans())))
                for name, pieces in parts.items():
                    events, took, cpu = (_sum(pieces, key) for key in ("events", "took", "cpu"))
                    found[name].append({"rate": events / took, "cpu": cpu / events * 1e6})
        except BaseException:
            for cluster in clusters.values():
                sys.stderr.write(cluster.logs())
            raise
    return list(_rows(found, spans))


def _sum(pieces: list[Numbers], key: str) -> float:
    return sum(numbers[key] for numbers in pieces)


def _start(stack: ExitStack, directory: Path, ratio: float | None, endpoint: str) -> LocalCluster:
    directory.mkdir()
    environ: dict[str, str] = {}
    if ratio is not None:
        environ |= {f"STEWARD_{role}_OTLP_ENDPOINT": endpoint for role in ROLES}
        environ |= {f"STEWARD_{role}_TRACE_RATIO": str(ratio) for role in ROLES}
    cluster = LocalCluster.start(directory, f"--agent={AGENTS}:burst", environ=environ)
    stack.callback(cluster.end)
    return cluster.wait_ready()


def _rows(found: dict[str, list[Numbers]], spans: list[float]) -> Iterator[Row]:
    for name, rounds in found.items():
        yield Row(f"traces {name}: events", "/s", [numbers["rate"] for numbers in rounds])
        cpu = [numbers["cpu"] for numbers in rounds]
        yield Row(f"traces {name}: CPU per event, whole cluster", "µs", cpu, None, True)
    off = [numbers["cpu"] for numbers in found["off"]]
    for name, goal in (("1 %", MOST_COST), ("100 %", None)):
        pairs = zip(found[name], off, strict=True)
        more = [(numbers["cpu"] / without - 1) * 100 for numbers, without in pairs]
        yield Row(f"traces {name}: more CPU than without", "%", more, goal, True)
    yield Row("spans that arrived in a round", "", spans)


if __name__ == "__main__":
    run_alone(figures, __doc__)
