"""`make bench`: how fast this machine is, through real processes and real WebSockets.

Starts a cluster of its own on free ports and a temporary directory, with an agent that
only emits, and measures from outside: time to `ready` of the cluster and of a
connection, first event on an idle cluster, and durable events per second with many users
at once. The load client shares the machine. Prints what it saw; asserts nothing.
"""

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from steward.cli.cluster_file import read_cluster
from steward.cli.ports import PortReservations
from steward.model.keys import DEFAULT_TENANT, UserKey
from steward.rpc.keys import USER_KEY, load_or_create_key
from steward.tokens import mint

AGENT = """\
async def burst(run):
    for i in range(int(run.input.text)):
        await run.emit("tick", i)
"""
RECEIVE_S = 60.0


def main() -> None:
    """Parse the command line, start the cluster, measure, stop it."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--users", type=int, default=50, help="users at once (50)")
    parser.add_argument("--events", type=int, default=400, help="events of each user (400)")
    parser.add_argument("--messages", type=int, default=50, help="messages one by one (50)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="steward-bench-") as folder:
        data = Path(folder) / "data"
        agent = Path(folder) / "bench_agent.py"
        agent.write_text(AGENT)
        began = time.monotonic()
        up = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("steward"), "up", "--data", data),
                *("--port", str(free_port()), "--agent", f"{agent}:burst"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert up.stdout is not None
            if not up.stdout.readline():
                sys.exit("the cluster did not start")
            print(f"cluster ready      {time.monotonic() - began:8.2f} s")
            asyncio.run(measure(data, args.users, args.events, args.messages))
        finally:
            up.send_signal(signal.SIGINT)
            up.wait()


async def measure(data: Path, users: int, events: int, messages: int) -> None:
    """All measurements on a running cluster."""
    bench = Bench(data)
    async with aiohttp.ClientSession() as http:
        connects = [await bench.connect_and_leave(http, f"visitor-{i}") for i in range(messages)]
        show("connect to ready", connects)
        firsts = await bench.first_events(http, messages)
        show("first event", firsts)
        took = await bench.bursts(http, users, events)
    total = users * events
    print(f"events per second  {total / took:8.0f}     ({total} events of {users} users)")


def show(what: str, seconds: Sequence[float]) -> None:
    """Median and the worst of a hundred, in milliseconds."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    median = statistics.median(ordered)
    print(f"{what:<18} {median * 1000:8.1f} ms  p99 {p99 * 1000:.1f} ms  ({len(ordered)} times)")


class Bench:
    """A load client: one WebSocket per user."""

    def __init__(self, data: Path) -> None:
        self._url = read_cluster(data).url
        self._key = load_or_create_key(data, USER_KEY)

    async def connect(
        self, http: aiohttp.ClientSession, user: str
    ) -> aiohttp.ClientWebSocketResponse:
        """A socket after its `ready`."""
        token = mint(self._key, UserKey(DEFAULT_TENANT, user), 3600)
        socket = await http.ws_connect(
            f"{self._url}/v1/connect", headers={"Authorization": f"Bearer {token}"}
        )
        ready = json.loads(await socket.receive_str(timeout=RECEIVE_S))
        if ready["type"] != "ready":
            raise RuntimeError(f"no ready, but {ready}")
        return socket

    async def connect_and_leave(self, http: aiohttp.ClientSession, user: str) -> float:
        """Seconds from the handshake to `ready`, of a user that was never here."""
        began = time.perf_counter()
        socket = await self.connect(http, user)
        took = time.perf_counter() - began
        await socket.close()
        return took

    async def first_events(self, http: aiohttp.ClientSession, count: int) -> list[float]:
        """Seconds from sending a message to its first event, one message after the other."""
        socket = await self.connect(http, "first")
        times = []
        for i in range(count):
            began = time.perf_counter()
            await send(socket, f"m-{i}", 0)
            first = 0.0
            async for frame in received(socket):
                if not first and "sequence" in frame and frame["type"] != "accepted":
                    first = time.perf_counter() - began
                if frame["type"] == "agent_completed":
                    break
            times.append(first)
        await socket.close()
        return times

    async def bursts(self, http: aiohttp.ClientSession, users: int, events: int) -> float:
        """Seconds until all users have all events of one run each."""
        sockets = [await self.connect(http, f"user-{i}") for i in range(users)]
        began = time.perf_counter()
        await asyncio.gather(*(self._burst(socket, events) for socket in sockets))
        took = time.perf_counter() - began
        await asyncio.gather(*(socket.close() for socket in sockets))
        return took

    async def _burst(self, socket: aiohttp.ClientWebSocketResponse, events: int) -> None:
        await send(socket, "burst", events)
        came = 0
        while True:
            text = await socket.receive_str(timeout=RECEIVE_S)
            if text.startswith('{"type":"custom"'):
                came += 1
            elif '"agent_completed"' in text:
                break
        if came != events:
            raise RuntimeError(f"{came} of {events} events came")


async def send(socket: aiohttp.ClientWebSocketResponse, message_id: str, events: int) -> None:
    """Send a message that makes the agent emit so many events."""
    message = {"type": "user_message", "id": message_id, "content": str(events)}
    await socket.send_str(json.dumps(message))


async def received(
    socket: aiohttp.ClientWebSocketResponse,
) -> AsyncIterator[dict[str, Any]]:
    """Frames as they come, parsed."""
    while True:
        yield json.loads(await socket.receive_str(timeout=RECEIVE_S))


def free_port() -> int:
    """A port that was free a moment ago."""
    ports = PortReservations()
    try:
        return ports.reserve()
    finally:
        ports.close()


if __name__ == "__main__":
    main()
