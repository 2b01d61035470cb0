"""What a log costs when it holds many streams: start, attach, append, and bytes on disk.

    .venv/bin/python -m tests.load.growth_streams [--rounds 3] [--quick]

Attach (a seal by a new activation, as every new manager makes one) and append are measured in
the engine, alternating between a database of 1,000 streams and a large one, with the same
number of users, spread over all streams; the figure is the ratio of the large one to the
small one. The start is that of the log process, killed before and with a cold page cache,
until it says that it is ready. Last, users of both connect to a cluster each, by turns: what
the whole cluster's CPU has to do until `ready`. Quick: the large one has 100,000 streams, else
1,000,000.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from prometheus_client import CollectorRegistry

from agent_service.core.journal import Append, Committed, Seal, Sealed, StoredEvent
from agent_service.log.port import LogFailed
from agent_service.log.sqlite import SqliteLog
from agent_service.log.writer import Operation, Outcome
from steward.cli.cluster_file import read_cluster
from steward.load.wire import connect
from steward.model.keys import Epoch, UserKey
from steward.model.keys import Sequence as SequenceNumber
from steward.rpc.keys import USER_KEY, load_or_create_key
from steward.telemetry.catalog import LogMetrics
from steward.testing.local_cluster import LocalCluster
from steward.tokens import mint
from tests.load.alone import run_alone
from tests.load.growth_database import EVENTS, PAYLOAD, fill, users_of
from tests.load.growth_process import OneProcess
from tests.load.machine import cpu_by_name
from tests.load.rows import Row

FEW = 1_000
MANY, MANY_QUICK = 1_000_000, 50_000
USERS = 1_000
TOGETHER = 100
"""Operations that are submitted together, as of one message of a node."""
APPENDS = 5
CONNECTS, AT_ONCE = 100, 16
READY_S = 10.0


@dataclass(slots=True)
class Side:
    """One database, and microseconds of wall and CPU per operation, round by round."""

    data: Path
    streams: int
    users: list[UserKey]
    epoch: int = 1
    next: dict[UserKey, int] = field(default_factory=dict)
    attach: list[float] = field(default_factory=list)
    attach_cpu: list[float] = field(default_factory=list)
    append: list[float] = field(default_factory=list)
    append_cpu: list[float] = field(default_factory=list)

    async def round(self) -> None:
        """Open the log anew, attach all users, append to each of them some times."""
        log = SqliteLog(self.data, LogMetrics(CollectorRegistry()))
        await log.open()
        try:
            self.epoch += 1
            epoch = Epoch(self.epoch)
            began, cpu = time.perf_counter(), time.process_time()
            for batch in _batches(self.users):
                seals = [Seal(user, epoch, "after") for user in batch]
                for user, outcome in zip(batch, await _submit(log, seals), strict=True):
                    assert isinstance(outcome, Sealed), outcome
                    self.next[user] = outcome.next_sequence
            self.attach.append((time.perf_counter() - began) / len(self.users) * 1e6)
            self.attach_cpu.append((time.process_time() - cpu) / len(self.users) * 1e6)
            began, cpu = time.perf_counter(), time.process_time()
            for number in range(1, APPENDS + 1):
                for batch in _batches(self.users):
                    appends = [self._append(user, epoch, number) for user in batch]
                    for user, outcome in zip(batch, await _submit(log, appends), strict=True):
                        assert isinstance(outcome, Committed), outcome
                        self.next[user] = outcome.next_sequence
            total = len(self.users) * APPENDS
            self.append.append((time.perf_counter() - began) / total * 1e6)
            self.append_cpu.append((time.process_time() - cpu) / total * 1e6)
        finally:
            await log.close()

    def _append(self, user: UserKey, epoch: Epoch, number: int) -> Append:
        sequence = SequenceNumber(self.next[user])
        return Append(user, epoch, number, sequence, (StoredEvent(PAYLOAD, "main"),), ())


def _batches(users: Sequence[UserKey]) -> list[Sequence[UserKey]]:
    return [users[at : at + TOGETHER] for at in range(0, len(users), TOGETHER)]


async def _submit(log: SqliteLog, operations: Sequence[Operation]) -> Sequence[Outcome]:
    future: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()

    def done(outcomes: Sequence[Outcome] | LogFailed) -> None:
        if isinstance(outcomes, LogFailed):
            future.set_exception(outcomes)
        else:
            future.set_result(outcomes)

    log.submit(operations, len(operations) * len(PAYLOAD), done)
    return await future


def _make(root: Path, streams: int) -> tuple[Side, int]:
    data = root / str(streams)
    size = fill(data, streams)
    return Side(data, streams, list(users_of(streams, min(USERS, streams)))), size


def _forget_pages(data: Path) -> None:
    """Let the kernel drop the files from its cache, as after a start of the machine."""
    for path in data.glob("events.db*"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


async def _connects(side: Side, number: int) -> float:
    """Connect some users, others each time: microseconds of CPU of the cluster for each."""
    cluster = read_cluster(side.data)
    pids = {entry.id: entry.pid for entry in cluster.processes}
    key = load_or_create_key(side.data, USER_KEY)
    address = cluster.url.removeprefix("http://")
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(user: UserKey) -> None:
        async with limit:
            socket = await connect(address, user.user, mint(key, user, 3600))
            assert socket.sequence >= EVENTS, socket.ready
            socket.close()

    users = side.users[number * CONNECTS : (number + 1) * CONNECTS]
    before = cpu_by_name(pids)
    await asyncio.gather(*map(one, users))
    after = cpu_by_name(pids)
    return sum(after[name] - before[name] for name in pids) / len(users) * 1e6


def _attach_ratios(few: Side, large: Side, rounds: int) -> list[float]:
    """What a connection costs a cluster with many stored streams, to one with few."""
    with ExitStack() as stack:
        for side in (few, large):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="steward-growth-"))
            cluster = LocalCluster.start(Path(folder), data=side.data)
            stack.callback(cluster.end)
            cluster.wait_ready()
        # The first ones pay for what is loaded on demand.
        costs = [
            [uvloop.run(_connects(side, number)) for side in (few, large)]
            for number in range(rounds + 1)
        ]
    return [many / one for one, many in costs[1:]]


def figures(rounds: int, quick: bool) -> list[Row]:
    """Rows for `make bench`."""
    many = MANY_QUICK if quick else MANY
    with tempfile.TemporaryDirectory(prefix="steward-growth-") as folder:
        root = Path(folder)
        few, _ = _make(root, FEW)
        large, size = _make(root, many)
        starts: list[float] = []
        for _ in range(rounds):
            _forget_pages(large.data)
            with OneProcess("agent_service.log", large.data) as log:
                starts.append(log.ready_s)
        for _ in range(rounds + 1):
            for side in (few, large):
                uvloop.run(side.round())
        rounds = min(rounds, USERS // CONNECTS - 1)
        whole = _attach_ratios(few, large, rounds)
    what = f"{many:,} streams"

    def ratio(name: str) -> list[float]:
        # The first round pays for what is loaded on demand.
        pairs = zip(getattr(large, name)[1:], getattr(few, name)[1:], strict=True)
        return [one / other for one, other in pairs]

    return [
        Row(f"log process, killed, cold, {what}: start to ready", "s", starts, READY_S, True),
        Row(
            f"connect to `ready`, CPU of the cluster: {what} to {FEW:,}", "times", whole, 1.2, True
        ),
        Row(f"attach in the log: {what} to {FEW:,}", "times", ratio("attach")),
        Row(f"attach in the log: CPU, {what} to {FEW:,}", "times", ratio("attach_cpu")),
        Row(f"attach in the log, {what}", "µs", large.attach[1:]),
        Row(f"append: {what} to {FEW:,}", "times", ratio("append")),
        Row(f"append: CPU, {what} to {FEW:,}", "times", ratio("append_cpu"), 1.5, True),
        Row(f"append, {what}", "µs", large.append[1:]),
        Row(f"on disk: a stream of {EVENTS} events of {len(PAYLOAD)} bytes", "B", [size / many]),
    ]


if __name__ == "__main__":
    run_alone(figures, __doc__)
