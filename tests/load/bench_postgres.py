"""What the event log does on PostgreSQL: fenced durable events a second, and what it adds in time.

    .venv/bin/python -m tests.load.bench_postgres [--quick] [--rounds 3]

A real server with fsync on, one log engine, both on this machine. Appends of one event each,
as of `USERS` managers with one append in flight; then the same at a steady rate.
"""

import asyncio
import itertools
import statistics
import time

import uvloop
from prometheus_client import CollectorRegistry

from agent_service.core.journal import Append, Committed, Seal, Sealed, StoredEvent
from agent_service.log.postgres.connecting import Database
from agent_service.log.postgres.engine import PostgresLog
from steward.model.keys import Epoch, Sequence, UserKey
from steward.telemetry.catalog import LogMetrics
from steward.testing.postgres import PostgresServer
from tests.load.alone import run_alone
from tests.load.rows import Row

USERS = 1000
PAYLOAD = b"x" * 250
RATE = 10_000


class _Manager:
    """One user's appends, numbered as a manager does."""

    def __init__(self, log: PostgresLog, number: int) -> None:
        self._log = log
        self.user = UserKey("default", f"user-{number}")
        self.number = 0
        self.next = 1

    async def seal(self, epoch: int) -> None:
        sealed = await self._log.seal(Seal(self.user, Epoch(epoch), f"bench-{epoch}"))
        assert isinstance(sealed, Sealed)
        self.epoch, self.number, self.next = Epoch(epoch), 0, sealed.next_sequence

    async def append(self) -> None:
        self.number += 1
        event = StoredEvent(PAYLOAD, "main")
        request = Append(self.user, self.epoch, self.number, Sequence(self.next), (event,), ())
        outcome = await self._log.append(request)
        self.next += 1
        assert outcome == Committed(Sequence(self.next)), outcome


async def _at_most(managers: list[_Manager], seconds: float) -> float:
    """Events a second when every manager always has one append in flight."""
    end = time.monotonic() + seconds
    done = 0

    async def one(manager: _Manager) -> None:
        nonlocal done
        while time.monotonic() < end:
            await manager.append()
            done += 1

    began = time.monotonic()
    await asyncio.gather(*(one(manager) for manager in managers))
    return done / (time.monotonic() - began)


async def _at_rate(managers: list[_Manager], seconds: float) -> tuple[float, float]:
    """p50 and p99 in milliseconds at RATE events a second, from when an append was due."""
    took: list[float] = []
    loop = asyncio.get_running_loop()
    began = loop.time()
    due = itertools.count()

    async def one(manager: _Manager) -> None:
        while (number := next(due)) < RATE * seconds:
            at = began + number / RATE
            if at > loop.time():
                await asyncio.sleep(at - loop.time())
            await manager.append()
            took.append(1000 * (loop.time() - at))

    async with asyncio.TaskGroup() as group:
        for manager in managers:
            group.create_task(one(manager))
    cuts = statistics.quantiles(took, n=100)
    return cuts[49], cuts[98]


async def _measure(rounds: int, seconds: float) -> list[Row]:
    server = PostgresServer()
    server.start()
    try:
        url = server.url(await server.make_database())
        log = PostgresLog(Database(url), LogMetrics(CollectorRegistry()))
        await log.open()
        managers = [_Manager(log, number) for number in range(USERS)]
        await asyncio.gather(*(manager.seal(1) for manager in managers))
        await _at_most(managers, 1)
        rates = [await _at_most(managers, seconds) for _ in range(rounds)]
        paced = [await _at_rate(managers, seconds) for _ in range(rounds)]
        await log.close()
    finally:
        server.remove()
    what = f"PostgreSQL log, {USERS:,} users, one event each append"
    at = f"PostgreSQL log at {RATE:,} events/s: append to outcome"
    return [
        Row(f"{what}: most", "/s", rates, 20_000),
        Row(f"{at}, p50", "ms", [p50 for p50, _ in paced]),
        Row(f"{at}, p99", "ms", [p99 for _, p99 in paced], 20, lower_is_better=True),
    ]


def figures(rounds: int, quick: bool) -> list[Row]:
    """The rows of `make bench`."""
    return uvloop.run(_measure(rounds, 2.0 if quick else 5.0))


if __name__ == "__main__":
    run_alone(figures, __doc__)
