"""A registry process under load: one edge and three nodes on gRPC, as a benchmark needs them.

Every answer is checked: it is of the user that was asked for, on a node that lives, and no epoch
is given to two users. A refusal ends the measurement.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from steward.rpc.factory import make_channel
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.v1 import placement_pb2
from steward.v1 import registry_service_pb2 as pb
from steward.v1.registry_service_pb2_grpc import RegistryServiceStub

CLUSTER = "bench"
TENANT = "bench"
NODES = 3
IN_REQUEST = 512
WAITING = 4
"""Requests without an answer: enough to keep the store busy, few enough for its deadline."""
START_S = 30.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
BEAT_S = 0.25


def user_id(number: int) -> str:
    """The id of a user; neighbours in number are far from each other in the order of ids."""
    return f"{number * 2654435761 % (1 << 32):08x}"


@dataclass(frozen=True, slots=True)
class Cost:
    """What so many resolves took: of the clock, of the event loop's thread, of all other threads.

    All in seconds; the other threads are those of the store and of gRPC.
    """

    users: int
    wall_s: float
    loop_s: float
    others_s: float

    @property
    def per_second(self) -> float:
        return self.users / self.wall_s

    @property
    def cpu_us(self) -> float:
        """CPU microseconds per user, all threads."""
        return (self.loop_s + self.others_s) / self.users * 1e6

    @property
    def loop_us(self) -> float:
        return self.loop_s / self.users * 1e6


class RegistryStand:
    """The registry process on the data directory `data`, and its clients."""

    def __init__(self, data: Path, *more_options: str, address: str = "127.0.0.1:1") -> None:
        """`address` is that of all nodes; a registry that starts again dials it at once."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        options = [f"--data={data}", f"--cluster={CLUSTER}", f"--grpc-port={port}"]
        options += ["--ops-port=0", f"--parent-pid={os.getpid()}", *more_options]
        self._key = load_or_create_key(data, CONTROL_KEY)
        self._began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "registry_service", *options], stderr=subprocess.DEVNULL
        )
        self._channel = make_channel(f"127.0.0.1:{port}")
        self._stub = RegistryServiceStub(self._channel)
        self._tasks: list[asyncio.Task[None]] = []
        self._requests: list[_Request] = []
        self._confirms: dict[int, asyncio.Future[int]] = {}
        self._first_node: Any = None
        self._address = address
        # Who has which epoch.
        self._owners: dict[int, int] = {}
        # Where the users are who were resolved.
        self.nodes: dict[int, str] = {}
        self._writing = asyncio.Lock()
        # From the start of the process until it serves: of the clock, and of CPU.
        self.start_s = 0.0
        self.start_cpu_s = 0.0

    async def __aenter__(self) -> Self:
        async with asyncio.timeout(START_S):
            await self._channel.channel_ready()
        self.start_s = time.perf_counter() - self._began
        self.start_cpu_s = sum(self._threads_s())
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

    def _metadata(self, role: Role, name: str) -> tuple[tuple[str, str], ...]:
        token = RoleCredentials(self._key, role, CLUSTER, name).token()
        return (("authorization", f"Bearer {token}"),)

    async def _join(self, number: int) -> None:
        """A node that beats, renews, and says that the log is empty."""
        name = f"node-{number}"
        call = self._stub.HoldNodeSession(metadata=self._metadata(Role.AGENT, name))
        hello = pb.NodeHello(
            cluster=CLUSTER, node_id=name, nonce=name, address=self._address, pid=number + 1
        )
        await call.write(pb.HoldNodeSessionRequest(hello=hello))
        writing = asyncio.Lock()

        async def send(**body: Any) -> None:
            async with writing:
                await call.write(pb.HoldNodeSessionRequest(**body))

        async def beat() -> None:
            renewal = 0
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # It was killed.
                while True:
                    renewal += 1
                    await send(beat=pb.NodeBeat(beat=renewal, log_reachable=True))
                    await send(renew=pb.RenewLease(renewal=renewal))
                    await asyncio.sleep(BEAT_S)

        welcomed = asyncio.Event()

        async def read() -> None:
            with suppress(grpc.aio.AioRpcError):
                async for message in call:
                    match message.WhichOneof("body"):
                        case "welcome":
                            welcomed.set()
                        case "ask_log_head":
                            await send(log_head=pb.ReportLogHead())
                        case "confirmed":
                            answer = message.confirmed
                            count = len(answer.placements)
                            self._confirms.pop(answer.request_id).set_result(count)

        if number == 0:
            self._first_node = send

        self._tasks += [asyncio.create_task(beat()), asyncio.create_task(read())]
        async with asyncio.timeout(START_S):
            await welcomed.wait()

    async def _read_edge(self) -> None:
        async for message in self._edge:
            if message.WhichOneof("body") == "resolved":
                resolved = message.resolved
                self._requests[resolved.request_id].take(resolved)

    async def resolve(self, numbers: Sequence[int]) -> Cost:
        """Resolve these users, a few requests at a time."""
        gate = asyncio.Semaphore(WAITING)
        first = len(self._requests)
        for begin in range(0, len(numbers), IN_REQUEST):
            part = numbers[begin : begin + IN_REQUEST]
            self._requests.append(_Request(len(self._requests), part))
        requests = self._requests[first:]

        async def ask(request: _Request) -> None:
            async with gate:
                async with self._writing:
                    await self._edge.write(request.message)
                await request.answered

        loop, others = self._threads_s()
        began = time.perf_counter()
        await asyncio.gather(*map(ask, requests))
        took = time.perf_counter() - began
        loop_after, others_after = self._threads_s()
        for request in requests:
            self._check(request)
        return Cost(len(numbers), took, loop_after - loop, others_after - others)

    async def confirm(self, numbers: Sequence[int]) -> tuple[Cost, int]:
        """The first node asks which of these users are its own, as when edges attach to it.

        What that took, and how many they are.
        """
        loop, others = self._threads_s()
        began = time.perf_counter()
        own = 0
        for begin in range(0, len(numbers), IN_REQUEST):
            part = numbers[begin : begin + IN_REQUEST]
            users = [placement_pb2.UserKey(tenant_id=TENANT, user_id=user_id(n)) for n in part]
            answer = self._confirms[begin] = asyncio.get_running_loop().create_future()
            await self._first_node(confirm=pb.ConfirmPlacements(request_id=begin, users=users))
            own += await answer
        took = time.perf_counter() - began
        loop_after, others_after = self._threads_s()
        return Cost(len(numbers), took, loop_after - loop, others_after - others), own

    def _check(self, request: "_Request") -> None:
        assert len(request.placements) == len(request.numbers)
        for index, number in enumerate(request.numbers):
            placement = request.placements[index]
            assert placement.user.user_id == user_id(number)
            assert self._owners.setdefault(placement.epoch, number) == number
            self.nodes[number] = placement.node_id
        request.placements.clear()

    def _threads_s(self) -> tuple[float, float]:
        """CPU seconds of the event loop's thread, and of all others, to a hundredth."""
        loop = others = 0.0
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            fields = (thread / "stat").read_text().rpartition(")")[2].split()
            used = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
            if thread.name == str(self.process.pid):
                loop = used
            else:
                others += used
        return loop, others

    async def idle(self, seconds: float) -> float:
        """The share of a core that the process takes while the nodes only beat."""
        before = sum(self._threads_s())
        await asyncio.sleep(seconds)
        return (sum(self._threads_s()) - before) / seconds

    async def kill(self, number: int) -> None:
        """Evidence A about a node: its users are nowhere after this."""
        report = pb.ReportDeathRequest(node_id=f"node-{number}", pid=number + 1, evidence="bench")
        metadata = self._metadata(Role.OPERATOR, "bench")
        response = await self._stub.ReportDeath(report, metadata=metadata)
        assert response.fenced


class _Request:
    """One ResolveManagers on its way. Its answer may come in parts."""

    def __init__(self, number: int, numbers: Sequence[int]) -> None:
        self.numbers = numbers
        users = [placement_pb2.UserKey(tenant_id=TENANT, user_id=user_id(n)) for n in numbers]
        queries = [pb.UserQuery(user=user) for user in users]
        resolve = pb.ResolveManagersRequest(request_id=number, users=queries)
        self.message = pb.HoldEdgeSessionRequest(resolve=resolve)
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # By the place of the user in the request.
        self.placements: dict[int, placement_pb2.Placement] = {}

    def take(self, resolved: pb.ResolveManagersResponse) -> None:
        indexes = resolved.indexes or range(len(resolved.results))
        for index, result in zip(indexes, resolved.results, strict=True):
            if not result.HasField("placement"):
                self.answered.set_exception(RuntimeError(result.refusal.message))
                return
            self.placements[index] = result.placement
        if not resolved.more:
            self.answered.set_result(None)
