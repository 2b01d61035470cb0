"""What an edge can push, and what an idle connection costs. Not a test: run it by hand.

    python tests/load/bench_edge.py [--connections 1000] [--frames 200] [--rounds 200]

A child process is the edge: its real HTTP server, handshakes, sessions and sockets, on
uvloop, with peers in memory. This process is the clients: plain sockets that read and
throw away. Deliveries enter where they come off a node's stream, one per user and loop
turn; the figures are frames per second of the edge's own CPU time. Decoding gRPC is not in
them (see the table in the design notes: 5 microseconds an event in batches of 50).
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import uvloop
from aiohttp import web
from prometheus_client import CollectorRegistry

from edge.core.commands import Delivery
from edge.core.server_messages import Limits
from edge.host.hub import Hub, HubSettings
from edge.server.app import doors_for, make_app, make_runner
from edge.uplink.memory import MemoryAuth, MemoryCluster, MemoryNodes, MemoryRegistry
from steward.model.identity import Identity
from steward.model.keys import UserKey
from steward.runtime.clock import wall_ms
from steward.telemetry.catalog import EdgeMetrics
from steward.telemetry.tracing import Tracing

TABS = 2


def resident_kib() -> int:
    """RSS of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


async def serve(connections: int, frames: int, rounds: int, bursts: list[int]) -> None:
    """The edge: waits for its clients, then measures."""
    limits = Limits(65_536, 600, connections, 60_000)
    hub = Hub(
        HubSettings(limits, connections + 10, 1 << 24, 0, 0),
        EdgeMetrics(CollectorRegistry()),
        Tracing(),
    )
    cluster, auth = MemoryCluster(), MemoryAuth()
    cluster.add_node("node-1")
    hub.registry, hub.auth = MemoryRegistry(cluster, hub), auth
    hub.nodes = MemoryNodes(cluster, hub)
    users = [UserKey("default", f"u{n}") for n in range(connections // TABS)]
    for user in users:
        auth.tokens[user.user] = Identity(user, (), wall_ms() + 3_600_000, wall_ms(), "t")
    hub.start()
    port = 0
    app = make_app(
        hub,
        EdgeMetrics(CollectorRegistry()),
        lambda: doors_for("", port, (), loopback=True),
        lambda: None,
        Path(),
        65_536,
    )
    runner = make_runner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    port = runner.addresses[0][1]
    before_kib, before_cpu = resident_kib(), time.process_time()
    print(json.dumps({"port": port}), flush=True)
    while len(hub._connections) < connections or not all(
        len(a.connections) == TABS and a.attachment.live_epoch for a in hub._audiences.values()
    ):
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    cpu = time.process_time() - before_cpu
    report = {
        "kib_per_connection": round((resident_kib() - before_kib) / connections, 2),
        "handshakes_per_cpu_second": round(connections / cpu),
    }
    for burst in bursts:
        report[f"frames_per_cpu_second_burst_{burst}"] = await push(
            hub, cluster, users, frames, rounds // burst, burst
        )
    print(json.dumps(report), flush=True)
    os._exit(0)


async def push(
    hub: Hub, cluster: MemoryCluster, users: list[UserKey], size: int, rounds: int, burst: int
) -> int:
    """Deliver `burst` events to every user per loop turn; frames per second of CPU."""
    events = [b"x" * size] * burst
    (source,) = cluster.nodes
    begin = time.process_time()
    for _ in range(rounds):
        deliveries = []
        for user in users:
            stream = cluster.stream(user)
            first = len(stream.events) + 1
            stream.events.extend(events)
            epoch = cluster.placements[user].epoch
            deliveries.append(Delivery(user, epoch, first, events))
        hub.delivered(source, deliveries)
        await asyncio.sleep(0)
    await asyncio.sleep(0.2)
    return round(rounds * burst * len(users) * TABS / (time.process_time() - begin))


async def drink(port: int, user: str) -> None:
    """One client: a handshake by hand, then reading without looking."""

    class Drain(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "write")
            transport.write(  # type: ignore[attr-defined]
                f"GET /v1/connect HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
                "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                f"Authorization: Bearer {user}\r\n\r\n".encode()
            )

    await asyncio.get_running_loop().create_connection(Drain, "127.0.0.1", port)


async def clients(port: int, connections: int) -> None:
    for n in range(connections):
        await drink(port, f"u{n // TABS}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--frames", type=int, default=200, help="bytes of one event")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--bursts", type=int, nargs="*", default=[1, 2, 8])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve(args.connections, args.frames, args.rounds, args.bursts))
    child = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--serve"], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    port = json.loads(child.stdout.readline())["port"]

    async def run() -> str:
        await clients(port, args.connections)
        assert child.stdout is not None
        return await asyncio.get_running_loop().run_in_executor(None, child.stdout.readline)

    report = json.loads(uvloop.run(run()))
    child.wait(10)
    for name, value in report.items():
        print(f"{name:40} {value:>12,}")


if __name__ == "__main__":
    main()
