"""What a registry process does on this machine, over one gRPC stream of one edge.

    .venv/bin/python -m tests.load.bench_registry [--users 100000]

A real process on SQLite, three sessions of nodes, one of an edge. Prints new placements
(durable), resolves of placed users, what the process costs when nothing happens, its memory, and
how long 5,000 users of a dead node wait for their new one. Figures of a shared machine drift by
20 % and more: compare runs side by side.
"""

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import grpc
import uvloop

from steward.rpc.factory import make_channel
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.v1 import placement_pb2
from steward.v1 import registry_service_pb2 as pb
from steward.v1.registry_service_pb2_grpc import RegistryServiceStub
from tests.load.machine import cpu_seconds, facts, load, resident_kib

CLUSTER = "bench"
NODES = 3
IN_REQUEST = 512
WAITING = 8
"""Requests without an answer: enough to keep the store busy, few enough for its deadline."""
STORM = 5_000
IDLE_S = 5.0
START_S = 10.0
BEAT_S = 0.25


class Bench:
    """The registry process and its clients."""

    def __init__(self, data: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        options = [f"--data={data}", f"--cluster={CLUSTER}", f"--grpc-port={port}"]
        options += ["--ops-port=0", f"--parent-pid={os.getpid()}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "registry_service", *options], stderr=subprocess.DEVNULL
        )
        self._key = load_or_create_key(data, CONTROL_KEY)
        self._channel = make_channel(f"127.0.0.1:{port}")
        self._stub = RegistryServiceStub(self._channel)
        self._tasks: list[asyncio.Task[None]] = []
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._request = 0
        self._writing = asyncio.Lock()
        # Some users of the first node.
        self.of_first: list[int] = []

    def _metadata(self, role: Role, name: str) -> tuple[tuple[str, str], ...]:
        token = RoleCredentials(self._key, role, CLUSTER, name).token()
        return (("authorization", f"Bearer {token}"),)

    async def __aenter__(self) -> Self:
        async with asyncio.timeout(START_S):
            await self._channel.channel_ready()
        for number in range(NODES):
            await self._join(number)
        self._edge = self._stub.HoldEdgeSession(metadata=self._metadata(Role.EDGE, "edge"))
        hello = pb.EdgeHello(cluster=CLUSTER, edge_id="edge")
        await self._edge.write(pb.HoldEdgeSessionRequest(hello=hello))
        self._tasks.append(asyncio.create_task(self._read_edge()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()
        self.process.terminate()
        self.process.wait(START_S)

    async def _join(self, number: int) -> None:
        """A node that beats, renews, and says that the log is empty."""
        name = f"node-{number}"
        call = self._stub.HoldNodeSession(metadata=self._metadata(Role.AGENT, name))
        hello = pb.NodeHello(
            cluster=CLUSTER, node_id=name, nonce=name, address="127.0.0.1:1", pid=number + 1
        )
        await call.write(pb.HoldNodeSessionRequest(hello=hello))
        writing = asyncio.Lock()

        async def send(**body: Any) -> None:
            async with writing:
                await call.write(pb.HoldNodeSessionRequest(**body))

        async def beat() -> None:
            renewal = 0
            while True:
                renewal += 1
                await send(beat=pb.NodeBeat(beat=renewal, log_reachable=True))
                await send(renew=pb.RenewLease(renewal=renewal))
                await asyncio.sleep(BEAT_S)

        async def read() -> None:
            try:
                async for message in call:
                    if message.WhichOneof("body") == "ask_log_head":
                        await send(log_head=pb.ReportLogHead())
            except grpc.aio.AioRpcError:
                return  # The node that is declared dead.

        self._tasks += [asyncio.create_task(beat()), asyncio.create_task(read())]

    async def _read_edge(self) -> None:
        async for message in self._edge:
            if message.WhichOneof("body") == "resolved":
                resolved = message.resolved
                waiting = self._answers[resolved.request_id]
                for result in resolved.results:
                    if result.WhichOneof("result") == "refusal":
                        waiting.set_exception(RuntimeError(result.refusal.message))
                        return
                    if result.placement.node_id == "node-0" and len(self.of_first) < STORM:
                        self.of_first.append(int(result.user.user_id))
                if not resolved.more:
                    waiting.set_result(resolved)

    async def resolve(self, users: Sequence[int]) -> float:
        """Seconds until all of them have an answer; a refusal ends the measurement."""
        gate = asyncio.Semaphore(WAITING)

        async def ask(part: Sequence[int]) -> None:
            async with gate:
                self._request += 1
                number = self._request
                answer = self._answers[number] = asyncio.get_running_loop().create_future()
                request = pb.ResolveManagersRequest(
                    request_id=number, users=[_query(user) for user in part]
                )
                async with self._writing:
                    await self._edge.write(pb.HoldEdgeSessionRequest(resolve=request))
                await answer
                del self._answers[number]

        parts = [users[first : first + IN_REQUEST] for first in range(0, len(users), IN_REQUEST)]
        began = time.perf_counter()
        await asyncio.gather(*map(ask, parts))
        return time.perf_counter() - began

    async def kill(self, number: int) -> None:
        """Evidence A about a node: its users are nowhere after this."""
        report = pb.ReportDeathRequest(node_id=f"node-{number}", pid=number + 1, evidence="bench")
        metadata = self._metadata(Role.OPERATOR, "bench")
        response = await self._stub.ReportDeath(report, metadata=metadata)
        assert response.fenced


def _query(number: int) -> pb.UserQuery:
    user = placement_pb2.UserKey(tenant_id="bench", user_id=str(number))
    return pb.UserQuery(user=user)


async def measure(data: Path, users: int) -> None:
    async with Bench(data) as bench:
        pid = bench.process.pid
        await bench.resolve(range(users, users + 1))
        empty = resident_kib(pid)
        took = await bench.resolve(range(users))
        print(f"new placements, durable     {users / took:>12,.0f} /s")
        print(f"memory of {users:,} of them {(resident_kib(pid) - empty) / 1024:>10,.0f} MiB")
        took = await bench.resolve(range(users))
        print(f"resolves of placed users    {users / took:>12,.0f} /s")
        before = cpu_seconds(pid)
        await asyncio.sleep(IDLE_S)
        print(
            f"idle                        {(cpu_seconds(pid) - before) / IDLE_S:>12.2%} of a core"
        )
        await bench.kill(0)
        took = await bench.resolve(list(bench.of_first))
        print(f"{len(bench.of_first):,} users of a dead node {took * 1000:>14,.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    options = parser.parse_args()
    print(f"{facts()}, load {load():.1f}")
    with tempfile.TemporaryDirectory() as folder:
        uvloop.run(measure(Path(folder), options.users))


if __name__ == "__main__":
    main()
