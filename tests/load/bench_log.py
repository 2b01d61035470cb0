"""Durable appends per second of the event log, one 250-byte event each, from many users.

    .venv/bin/python tests/load/bench_log.py [--seconds 5] [--users 500] [--profile FILE]

Each user has one append in flight, as a manager has. Prints one table: SQLite in this
process, and `RemoteLog` over a real log process on this machine. Figures of a shared
machine drift by 20 % and more: compare runs side by side.
"""

import argparse
import asyncio
import cProfile
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry

from agent_service.core.journal import Append, Committed, Seal, Sealed, StoredEvent
from agent_service.log.port import EventLog
from agent_service.log.remote import RemoteLog
from agent_service.log.sqlite import SqliteLog
from steward.model.keys import Epoch, NodeId, Sequence, UserKey
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.telemetry.catalog import LogMetrics

PAYLOAD = b'{"type":"agent_text","data":"' + b"x" * 219 + b'"}'


class Load:
    """Users that append one event after the other until the time is up."""

    def __init__(self, log: EventLog, users: int) -> None:
        self._log = log
        self._users = [UserKey("bench", f"user-{n}") for n in range(users)]
        self._event = (StoredEvent(PAYLOAD, "main"),)
        self.latencies: list[float] = []
        self.stopping = False

    async def run(self, seconds: float, label: str) -> float:
        """Events per second."""
        sealed = await asyncio.gather(
            *(self._log.seal(Seal(u, Epoch(1), "a")) for u in self._users)
        )
        for outcome in sealed:
            assert isinstance(outcome, Sealed), outcome
        ends = [asyncio.get_running_loop().create_future() for _ in self._users]
        began = time.perf_counter()
        for user, end in zip(self._users, ends, strict=True):
            self._next(user, 1, end)
        for second in range(int(seconds)):
            await asyncio.sleep(1)
            rate = len(self.latencies) / (time.perf_counter() - began)
            print(f"\r{label}: {second + 1} s, {rate:,.0f}/s ", end="", file=sys.stderr)
        self.stopping = True
        await asyncio.gather(*ends)
        took = time.perf_counter() - began
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
        return len(self.latencies) / took

    def _next(self, user: UserKey, number: int, end: "asyncio.Future[None]") -> None:
        began = time.perf_counter()

        def done(future: "asyncio.Future[Any]") -> None:
            outcome = future.result()
            assert type(outcome) is Committed, outcome
            self.latencies.append(time.perf_counter() - began)
            if self.stopping:
                end.set_result(None)
            else:
                self._next(user, number + 1, end)

        append = Append(user, Epoch(1), number, Sequence(number), self._event, ())
        self._log.append(append).add_done_callback(done)


def report(label: str, load: Load, rate: float) -> str:
    times = sorted(load.latencies)
    p50 = times[len(times) // 2] * 1000
    p99 = times[len(times) * 99 // 100] * 1000
    return f"{label:<34}{rate:>12,.0f}{p50:>10.2f}{p99:>10.2f}"


def process_module() -> ModuleType:
    """The process helper of the integration tests; test folders are no packages."""
    path = Path(__file__).parents[1] / "integration" / "log" / "logprocess.py"
    spec = importlib.util.spec_from_file_location("logprocess", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def direct(data: Path, seconds: float, users: int) -> str:
    log = SqliteLog(data, LogMetrics(CollectorRegistry()))
    await log.open()
    try:
        load = Load(log, users)
        return report("SQLite in this process", load, await load.run(seconds, "direct"))
    finally:
        await log.close()


async def remote(data: Path, seconds: float, users: int, profile: str) -> str:
    child = process_module().LogChild(data)
    await child.start()
    credentials = RoleCredentials(
        load_or_create_key(data, CONTROL_KEY), Role.AGENT, "steward", "bench"
    )
    log = RemoteLog(child.address, "steward", NodeId("bench"), credentials)
    await log.open()
    try:
        load = Load(log, users)
        profiler = cProfile.Profile()
        if profile:
            profiler.enable()
        before = os.times()
        rate = await load.run(seconds, "remote")
        after = os.times()
        if profile:
            profiler.disable()
            profiler.dump_stats(profile)
        cpu = (after.user + after.system - before.user - before.system) / len(load.latencies)
        line = report("RemoteLog, log process, gRPC", load, rate)
        return f"{line}   client {cpu * 1e6:.0f} µs of CPU per append"
    finally:
        await log.close()
        await child.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--users", type=int, default=500)
    parser.add_argument("--profile", default="", help="write a cProfile of the remote client here")
    parser.add_argument("--only", choices=("direct", "remote"), default=None)
    options = parser.parse_args()
    print(f"{'event log, 1 event per append':<34}{'appends/s':>12}{'p50 ms':>10}{'p99 ms':>10}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if options.only != "remote":
            print(uvloop.run(direct(root / "direct", options.seconds, options.users)))
        if options.only != "direct":
            run = remote(root / "remote", options.seconds, options.users, options.profile)
            print(uvloop.run(run))


if __name__ == "__main__":
    main()
