"""How fast a client catches up: events per second of a replay, from the log to the socket.

    .venv/bin/python -m tests.load.growth_replay [--rounds 3] [--quick]

A cluster of its own. One user's agent emits 10,000 events at a pace, so that the log holds them
in many small appends, as it does those of an agent that speaks; another's as fast as it can.
Then connections come one after the other with `after=0`; the time is from opening the
socket to the last event, the sequence of each of which is checked. CPU is that of each
process, over all events of the replays of a round.
"""

import asyncio
import base64
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from steward.cli.cluster_file import read_cluster
from steward.load.wire import LoadSocket, connect
from steward.model.keys import DEFAULT_TENANT, UserKey
from steward.rpc.keys import USER_KEY, load_or_create_key
from steward.testing.local_cluster import LocalCluster
from steward.tokens import mint
from tests.load.alone import run_alone
from tests.load.machine import cpu_by_name
from tests.load.rows import Row

AGENTS = Path(__file__).parent / "agents.py"
EVENTS, EVENTS_QUICK = 10_000, 4_000
PACE = 2_500
REPLAYS, REPLAYS_QUICK = 5, 2
GOAL = 50_000.0
RUN_S = 60.0


class ReplaySocket(LoadSocket):
    """A connection that has nothing yet: events are counted from the first of the stream."""

    def _message(self, frame: dict[str, Any]) -> None:
        super()._message(frame)
        if frame["type"] == "ready":
            self.sequence = 0


async def replay(address: str, user: str, token: str, until: int) -> float:
    """Connect with `after=0` and read up to `until`. Seconds."""
    host, _, port = address.rpartition(":")
    key = base64.b64encode(os.urandom(16)).decode()
    request = (
        f"GET /v1/connect?after=0 HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
        f"Sec-WebSocket-Protocol: steward.v1\r\nAuthorization: Bearer {token}\r\n\r\n"
    ).encode()
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    _, socket = await loop.create_connection(lambda: ReplaySocket(user, request), host, int(port))
    try:
        await socket.until_event(until - 1, RUN_S)
        took = time.perf_counter() - began
    finally:
        socket.close()
    assert socket.sequence == until, (socket.sequence, until)
    return took


async def _measure(data: Path, rounds: int, wanted: int, replays: int) -> dict[str, list[float]]:
    cluster = read_cluster(data)
    address = cluster.url.removeprefix("http://")
    key = load_or_create_key(data, USER_KEY)
    pids = {entry.id: entry.pid for entry in cluster.processes} | {"client": os.getpid()}
    found: dict[str, list[float]] = {name: [] for name in ("paced", "burst", *pids)}
    ends: dict[str, int] = {}
    tokens: dict[str, str] = {}
    for agent, content in (("paced", f"{wanted} {PACE} 0"), ("burst", str(wanted))):
        tokens[agent] = mint(key, UserKey(DEFAULT_TENANT, agent), 3600)
        socket = await connect(address, agent, tokens[agent])
        socket.send(f"m-{agent}", content, agent)
        await socket.until_runs_ended(1, RUN_S)
        ends[agent] = socket.sequence
        socket.close()
    for number in range(rounds + 1):
        before = cpu_by_name(pids)
        events = 0
        for agent, until in ends.items():
            times = [await replay(address, agent, tokens[agent], until) for _ in range(replays)]
            events += until * replays
            if number:  # The first round pays for what is loaded on demand.
                found[agent].append(until * replays / sum(times))
        after = cpu_by_name(pids)
        for name in pids if number else ():
            found[name].append((after[name] - before[name]) / events * 1e6)
    return found


def figures(rounds: int, quick: bool) -> list[Row]:
    """Rows for `make bench`. Quick: fewer events, fewer replays."""
    events, replays = (EVENTS_QUICK, REPLAYS_QUICK) if quick else (EVENTS, REPLAYS)
    with tempfile.TemporaryDirectory(prefix="steward-growth-") as folder:
        agents = [f"--agent={AGENTS}:{name}" for name in ("paced", "burst")]
        cluster = LocalCluster.start(Path(folder), "--agents", "1", *agents)
        try:
            cluster.wait_ready()
            found = uvloop.run(_measure(cluster.data, rounds, events, replays))
        finally:
            cluster.end()
    what = f"replay of {events:,} events to one client"
    rows = [
        Row(f"{what}, stored one by one", "/s", found.pop("paced"), GOAL),
        Row(f"{what}, stored in bulk", "/s", found.pop("burst"), GOAL),
    ]
    return rows + [
        Row(f"replay: CPU per event, {name}", "µs", values)
        for name, values in sorted(found.items())
        if max(values) > 0.1
    ]


if __name__ == "__main__":
    run_alone(figures, __doc__)
