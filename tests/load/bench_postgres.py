"""What the event log does on PostgreSQL: fenced durable events a second, and what it adds in time.

    .venv/bin/python -m tests.load.bench_postgres [--quick] [--rounds 3]

A real server with fsync on, one log engine, both on this machine. Appends of one event each,
as of `USERS` managers with one append in flight; then the same at a steady rate. They come as
from a node's stream, by `submit`. The server's WAL segments have been used before, as
those of every server that has run for an hour; all else is as it comes, but for `OPTIONS`.
"""

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import uvloop
from prometheus_client import CollectorRegistry

from agent_service.core.journal import Append, Committed, Seal, Sealed, StoredEvent
from agent_service.log.port import LogFailed, Outcome
from agent_service.log.postgres.connecting import Database
from agent_service.log.postgres.engine import PostgresLog
from steward.model.keys import Epoch, UserKey
from steward.model.keys import Sequence as SequenceNumber
from steward.telemetry.catalog import LogMetrics
from steward.testing.postgres import PostgresServer, run_in
from tests.load.alone import run_alone
from tests.load.rows import Row

USERS = 1000
PAYLOAD = b"x" * 250
RATE = 10_000
OPTIONS = {"shared_buffers": "128MB", "min_wal_size": "768MB", "max_wal_size": "4GB"}
SEGMENTS = 40
TICK_S = 0.001
"""How often appends come in at a steady rate: those that are due go together, as in a frame."""


class _Manager:
    """One user's appends, numbered as a manager does. `answered` is called after each."""

    def __init__(self, log: PostgresLog, number: int) -> None:
        self._log = log
        self.user = UserKey("default", f"user-{number}")
        self.number = 0
        self.next = 1
        self.due = 0.0
        self.answered: Callable[[_Manager], None] = lambda _: None

    async def seal(self, epoch: int) -> None:
        sealed = await self._log.seal(Seal(self.user, Epoch(epoch), f"bench-{epoch}"))
        assert isinstance(sealed, Sealed)
        self.epoch, self.number, self.next = Epoch(epoch), 0, sealed.next_sequence

    def append(self) -> None:
        self.number += 1
        event = StoredEvent(PAYLOAD, "main")
        at = SequenceNumber(self.next)
        request = Append(self.user, self.epoch, self.number, at, (event,), ())
        self._log.submit((request,), len(PAYLOAD), self._done)

    def _done(self, outcomes: Sequence[Outcome] | LogFailed) -> None:
        self.next += 1
        assert not isinstance(outcomes, LogFailed), outcomes
        assert outcomes[0] == Committed(SequenceNumber(self.next)), outcomes
        self.answered(self)


async def _at_most(managers: list[_Manager], seconds: float) -> float:
    """Events a second when every manager always has one append in flight."""
    began = time.monotonic()
    done = 0
    working = len(managers)
    ended = asyncio.Event()

    def answered(manager: _Manager) -> None:
        nonlocal done, working
        done += 1
        if time.monotonic() < began + seconds:
            manager.append()
            return
        working -= 1
        if not working:
            ended.set()

    for manager in managers:
        manager.answered = answered
        manager.append()
    await ended.wait()
    return done / (time.monotonic() - began)


async def _at_rate(managers: list[_Manager], seconds: float) -> tuple[float, float]:
    """p50 and p99 in milliseconds at RATE events a second, from when an append was due."""
    took: list[float] = []
    free = deque(managers)
    began = time.monotonic()

    def answered(manager: _Manager) -> None:
        took.append(1000 * (time.monotonic() - manager.due))
        free.append(manager)

    for manager in managers:
        manager.answered = answered
    total = int(RATE * seconds)
    sent = 0
    while len(took) < total:
        # Where all have one in flight the next ones are late, and what they wait counts.
        due = min(total, int((time.monotonic() - began) * RATE))
        while sent < due and free:
            manager = free.popleft()
            manager.due = began + sent / RATE
            manager.append()
            sent += 1
        await asyncio.sleep(TICK_S)
    cuts = statistics.quantiles(took, n=100)
    return cuts[49], cuts[98]


async def _measure(rounds: int, seconds: float) -> list[Row]:
    server = PostgresServer(OPTIONS)
    server.start()
    try:
        await run_in(server, SEGMENTS)
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
