"""The measurements of `make bench`, as a client makes them: each is one coroutine.

They run in a process of their own (`measure` is its entry), so that the client's cost is
known and apart. Each opens its own connections, checks every sequence it gets, and
returns plain numbers; nothing here asserts how fast anything has to be.
"""

import asyncio
import itertools
import os
import signal
import statistics
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop

from steward.cli.cluster_file import ClusterFile, read_cluster
from steward.load.wire import LoadSocket, connect
from steward.model.keys import DEFAULT_TENANT, UserKey
from steward.rpc.keys import USER_KEY, load_or_create_key
from steward.tokens import mint
from tests.load.machine import cpu_by_name, memory_by_name

Numbers = dict[str, float]

RUN_S = 120.0
HEALED_S = 45.0
CONNECTS_AT_ONCE = 32


class Load:
    """A load client of the cluster on `data`. `label` keeps its users apart from others'."""

    def __init__(self, data: Path, label: str) -> None:
        self._data = data
        self._label = label
        self._key = load_or_create_key(data, USER_KEY)
        self._message_ids = itertools.count()

    @property
    def cluster(self) -> ClusterFile:
        return read_cluster(self._data)

    @property
    def pids(self) -> dict[str, int]:
        """Id → pid of every process of the cluster, and of this one."""
        return {entry.id: entry.pid for entry in self.cluster.processes} | {"client": os.getpid()}

    async def tabs(self, users: int, tabs: int = 1, prefix: str = "user") -> list[LoadSocket]:
        """Connections up to their `ready`: all tabs of the first user, then of the second."""
        address = self.cluster.url.removeprefix("http://")
        limit = asyncio.Semaphore(CONNECTS_AT_ONCE)

        async def one(user: str, token: str) -> LoadSocket:
            async with limit:
                return await connect(address, user, token)

        names = [f"{self._label}-{prefix}-{number}" for number in range(users)]
        tokens = [(name, mint(self._key, UserKey(DEFAULT_TENANT, name), 3600)) for name in names]
        return await asyncio.gather(*(one(*each) for each in tokens for _ in range(tabs)))

    def send(self, socket: LoadSocket, content: str, agent: str) -> None:
        socket.send(f"{self._label}-{next(self._message_ids)}", content, agent)


async def idle(load: Load, messages: int) -> Numbers:
    """One message after the other on an idle cluster: ms to `accepted` and to events."""
    sockets = await load.tabs(8)
    times: dict[str, list[float]] = {"first": [], "accepted": [], "started": [], "completed": []}
    for number in range(messages):
        socket = sockets[number % len(sockets)]
        seen: dict[str, float] = {}

        def note(text: bytes, seen: dict[str, float] = seen) -> None:
            now = time.perf_counter()
            seen.setdefault("first", now)
            if text.startswith(b'{"type":"agent_started"'):
                seen["started"] = now
            elif text.startswith(b'{"type":"agent_completed"'):
                seen["completed"] = now

        socket.on_event = note
        ended = socket.runs_ended
        began = time.perf_counter()
        load.send(socket, "hello", "echo")
        await socket.frame("accepted")
        seen["accepted"] = time.perf_counter()
        await socket.until_runs_ended(ended + 1, RUN_S)
        for name, list_of in times.items():
            list_of.append((seen[name] - began) * 1000)
    _close(sockets)
    numbers: Numbers = {}
    for name, values in times.items():
        numbers[f"{name}_p50"], numbers[f"{name}_p99"] = percentiles(values)
    return numbers


async def throughput(load: Load, users: int, tabs: int, events: int) -> Numbers:
    """All users at once, each with a run that emits as fast as it can; to all their tabs."""
    sockets = await load.tabs(users, tabs)
    pids = load.pids
    before = cpu_by_name(pids)
    began = time.perf_counter()
    for socket in sockets[::tabs]:
        load.send(socket, str(events), "burst")
    await asyncio.gather(*(socket.until_runs_ended(1, RUN_S) for socket in sockets))
    took = time.perf_counter() - began
    after = cpu_by_name(pids)
    per_user = {socket.events for socket in sockets}
    # user_message, agent_started, agent_thinking or not, the ticks, agent_completed
    assert min(per_user) >= events, per_user
    total = sum(socket.events for socket in sockets[::tabs])
    _close(sockets)
    return {"rate": total / took} | {
        f"cpu_{name}": (after[name] - before[name]) / total * 1e6 for name in pids
    }


async def latency(load: Load, users: int, tabs: int, rate: int, seconds: int) -> Numbers:
    """A fixed rate over all users: ms from the verb in the agent to each socket."""
    sockets = await load.tabs(users, tabs)
    times: list[float] = []

    def note(text: bytes) -> None:
        if text.startswith(b'{"type":"custom"'):
            at = text.rindex(b'"at":') + 5
            times.append((time.time_ns() - int(text[at : at + 19])) / 1e6)

    each = rate // users
    pids = load.pids
    before = cpu_by_name(pids)
    for number, socket in enumerate(sockets):
        socket.on_event = note
        if number % tabs == 0:
            phase_ms = number // tabs * 1000 // rate
            load.send(socket, f"{each * seconds} {each} {500 + phase_ms}", "paced")
    began = time.perf_counter()
    await asyncio.gather(*(socket.until_runs_ended(1, RUN_S) for socket in sockets))
    took = time.perf_counter() - began - 0.5
    after = cpu_by_name(pids)
    total = sum(socket.events for socket in sockets[::tabs])
    _close(sockets)
    p50, p99 = percentiles(times)
    return {"p50": p50, "p99": p99, "worst": max(times), "rate": total / took} | {
        f"cpu_{name}": (after[name] - before[name]) / total * 1e6 for name in pids
    }


async def failover(load: Load, users: int) -> Numbers:
    """Kill the node that has most of the users: ms until each hears its next manager."""
    sockets = await load.tabs(users)
    for socket in sockets:
        # A user without any event has no manager that could be missed.
        load.send(socket, "hello", "echo")
    await asyncio.gather(*(socket.until_runs_ended(1, RUN_S) for socket in sockets))
    holders = [socket.ready["manager"]["node_id"] for socket in sockets]
    victim = statistics.mode(holders)
    held = [socket for socket, node in zip(sockets, holders, strict=True) if node == victim]
    pid = load.pids[victim]
    gaps: list[float] = []
    killed = 0.0

    async def next_event(socket: LoadSocket) -> None:
        await socket.until_event(socket.sequence, HEALED_S)
        gaps.append((time.perf_counter() - killed) * 1000)

    waiting = [asyncio.create_task(next_event(socket)) for socket in held]
    await asyncio.sleep(0)
    killed = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    await asyncio.gather(*waiting)
    _close(sockets)
    return {"median": statistics.median(gaps), "worst": max(gaps), "users": len(held)}


async def memory(load: Load, connections: int) -> Numbers:
    """Idle connections, one user each: KiB that every process grew by, per connection."""
    # The first ones pay for buffers, caches and code that is loaded on demand.
    first = await load.tabs(100, prefix="first")
    pids = load.pids
    before = memory_by_name(pids)
    cpu_before = cpu_by_name(pids)
    began = time.perf_counter()
    sockets = await load.tabs(connections)
    took = time.perf_counter() - began
    after = memory_by_name(pids)
    cpu_after = cpu_by_name(pids)
    _close([*first, *sockets])
    numbers: Numbers = {"connects": connections / took}
    for name in pids:
        numbers[f"kib_{name}"] = (after[name] - before[name]) / connections
        numbers[f"cpu_{name}"] = (cpu_after[name] - cpu_before[name]) / connections * 1e6
    return numbers


MEASURES: dict[str, Callable[..., Coroutine[Any, Any, Numbers]]] = {
    function.__name__: function for function in (idle, throughput, latency, failover, memory)
}


def measure(data: str, label: str, name: str, options: dict[str, int]) -> Numbers:
    """Run one measurement in this process. The label must be new to the cluster."""
    return uvloop.run(MEASURES[name](Load(Path(data), label), **options))


def percentiles(values: list[float]) -> tuple[float, float]:
    """Median, and the one that 99 of 100 do not exceed."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]


def _close(sockets: list[LoadSocket]) -> None:
    for socket in sockets:
        socket.close()
