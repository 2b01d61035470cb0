"""A registry as a real process, and small gRPC clients that are neither node nor edge."""

import asyncio
import inspect
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from steward.rpc.factory import make_channel
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.v1 import placement_pb2, registry_service_pb2, registry_service_pb2_grpc

CLUSTER = "test"
DEADLINE_S = 15.0
# What comes at any time, to everybody: `expect` passes over it, `next` finds it when asked for.
BACKGROUND = ("beat", "members", "nodes", "ask_log_head")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RegistryProcess:
    """`python -m registry_service` on free ports; started again it keeps them and its data."""

    def __init__(self, data: Path, **options: str) -> None:
        self.data = data
        self.options = options
        self.grpc_port = free_port()
        self.ops_port = free_port()
        self.process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def spawn(self, **extra: str) -> subprocess.Popen[str]:
        options = {
            "data": str(self.data),
            "cluster": CLUSTER,
            "grpc-port": str(self.grpc_port),
            "ops-port": str(self.ops_port),
            "parent-pid": str(os.getpid()),
            **self.options,
            **extra,
        }
        command = [sys.executable, "-m", "registry_service"]
        for name, value in options.items():
            command += [f"--{name}", value]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def start(self, **extra: str) -> None:
        self.process = self.spawn(**extra)
        self.wait_ready()

    def wait_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + DEADLINE_S
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the registry did not start: {self._end()}")
            time.sleep(0.02)

    def ready(self) -> bool:
        try:
            return "ready" in self.ops("/readyz")
        except (OSError, urllib.error.HTTPError):
            return False

    def ops(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ops_port}{path}", timeout=5) as got:
            return str(got.read().decode())

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self._end()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        self._end()
        return int(self.process.returncode)

    def _end(self) -> str:
        assert self.process is not None
        try:
            return self.process.communicate(timeout=10)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.communicate()[1]

    def close(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            self._end()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[RegistryProcess]:
    """A process for one test."""
    process = RegistryProcess(tmp_path / "data")
    process.start()
    yield process
    process.close()


@pytest.fixture
def make_registry() -> Iterator[Callable[..., RegistryProcess]]:
    """Makes processes that are not started, with these data and options; they end with the test."""
    made: list[RegistryProcess] = []

    def make(data: Path, **options: str) -> RegistryProcess:
        made.append(RegistryProcess(data, **options))
        return made[-1]

    yield make
    for process in made:
        process.close()


@pytest.fixture
def clients_of() -> Callable[[Any], "Clients"]:
    """Makes clients of whatever has `data` and `address`; the test closes them."""
    return Clients


@pytest.fixture(scope="module")
def shared_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryProcess]:
    """A process for all tests of a module that leave nothing behind."""
    process = RegistryProcess(tmp_path_factory.mktemp("registry") / "data")
    process.start()
    yield process
    process.close()


class Session:
    """One stream of a client: what came is kept, and `expect` waits for what should come."""

    def __init__(self, call: Any, log_head: int | None = None) -> None:
        """`log_head` is what a node answers when it is asked for it; None: nothing."""
        self._call = call
        self._log_head = log_head
        self._writing = asyncio.Lock()
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self.error: grpc.aio.AioRpcError | None = None
        self.ended = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for message in self._call:
                self._messages.put_nowait(message)
                if self._log_head is not None and message.WhichOneof("body") == "ask_log_head":
                    head = registry_service_pb2.ReportLogHead(largest_fence=self._log_head)
                    await self.send(registry_service_pb2.HoldNodeSessionRequest(log_head=head))
        except grpc.aio.AioRpcError as error:
            self.error = error
        finally:
            self.ended.set()

    async def send(self, message: Any) -> None:
        async with self._writing:
            await self._call.write(message)

    async def expect(self, body: str) -> Any:
        """The next message but renewals and background, which must be of this kind."""
        return await self.next(body, "beat", "renewed")

    async def next(self, body: str, *dropped: str) -> Any:
        """The next message of this kind; before it only `dropped` ones and background may come."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                message = await self._messages.get()
                kind = message.WhichOneof("body")
                if kind == body:
                    return getattr(message, body)
                assert kind in (*dropped, *BACKGROUND), f"{kind} came before {body}"

    async def end(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.ended.wait()

    async def close(self) -> None:
        self._call.cancel()
        await asyncio.wait({self._task})


class Client:
    """A process of the cluster as far as the registry can see."""

    def __init__(self, registry: RegistryProcess, role: Role, *, cluster: str = CLUSTER) -> None:
        key = load_or_create_key(registry.data, CONTROL_KEY)
        self.credentials = RoleCredentials(key, role, cluster, f"{role}-test")
        self.channel = make_channel(registry.address)
        self.stub = registry_service_pb2_grpc.RegistryServiceStub(self.channel)
        self.sessions: list[Session] = []

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.credentials.token()}"),)

    def session(self, call: Any, log_head: int | None = None) -> Session:
        session = Session(call, log_head)
        self.sessions.append(session)
        return session

    async def close(self) -> None:
        for session in self.sessions:
            await session.close()
        await self.channel.close()


class NodeClient(Client):
    """Joins as a node that listens on a port of its own and beats until told to stop."""

    def __init__(self, registry: RegistryProcess, node_id: str) -> None:
        super().__init__(registry, Role.AGENT)
        self.node_id = node_id
        self.nonce = uuid.uuid4().hex
        self.listener: socket.socket | None = None
        self.beating: asyncio.Task[None] | None = None
        self.address = ""
        self.node_rev = 0
        self.log_head: int | None = 0
        self.open: Session

    def listen(self) -> str:
        # Nobody accepts but the kernel, as for a paused process.
        if self.listener is None:
            self.listener = socket.create_server(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        return self.address

    async def hello(self, **changes: Any) -> Session:
        fields = {
            "cluster": CLUSTER,
            "node_id": self.node_id,
            "boot_id": "boot",
            "nonce": self.nonce,
            "address": self.listen(),
            "version": "1",
            "pid": 4711,
            **changes,
        }
        call = self.stub.HoldNodeSession(metadata=self.metadata())
        session = self.session(call, self.log_head)
        await session.send(
            registry_service_pb2.HoldNodeSessionRequest(
                hello=registry_service_pb2.NodeHello(**fields)
            )
        )
        return session

    async def join(self) -> None:
        self.open = await self.hello()
        welcome = await self.open.expect("welcome")
        self.node_rev = welcome.node_rev
        self.beating = asyncio.create_task(self._beat(self.open))

    async def _beat(self, session: Session) -> None:
        request = registry_service_pb2.HoldNodeSessionRequest
        number = 0
        while not session.ended.is_set():
            number += 1
            await session.send(request(beat=registry_service_pb2.NodeBeat(beat=number)))
            await session.send(request(renew=registry_service_pb2.RenewLease(renewal=number)))
            await asyncio.sleep(0.1)

    async def stop_beating(self) -> None:
        if self.beating is not None:
            self.beating.cancel()
            await asyncio.wait({self.beating})

    async def die(self) -> None:
        """As the kernel does it for a killed process: listener and stream are gone."""
        await self.stop_beating()
        if self.listener is not None:
            self.listener.close()
        await super().close()

    async def close(self) -> None:
        await self.stop_beating()
        if self.listener is not None:
            self.listener.close()
        await super().close()


class EdgeClient(Client):
    def __init__(self, registry: RegistryProcess, edge_id: str) -> None:
        super().__init__(registry, Role.EDGE)
        self.edge_id = edge_id
        self.requests = 0
        self.open: Session

    async def join(self, cluster: str = CLUSTER) -> None:
        self.open = self.session(self.stub.HoldEdgeSession(metadata=self.metadata()))
        hello = registry_service_pb2.EdgeHello(cluster=cluster, edge_id=self.edge_id, version="1")
        await self.open.send(registry_service_pb2.HoldEdgeSessionRequest(hello=hello))

    async def connect(self) -> None:
        await self.join()
        await self.open.expect("welcome")

    async def resolve(self, *users: str, min_epoch: int = 0) -> list[Any]:
        self.requests += 1
        await self.open.send(
            registry_service_pb2.HoldEdgeSessionRequest(
                resolve=resolve_request(*users, min_epoch=min_epoch, request_id=self.requests)
            )
        )
        results: dict[int, Any] = {}
        more = True
        while more:
            resolved = await self.open.expect("resolved")
            assert resolved.request_id == self.requests
            indexes = resolved.indexes or range(len(users))
            results.update(zip(indexes, resolved.results, strict=True))
            more = resolved.more
        ordered = [results[index] for index in range(len(users))]
        assert [result.user.user_id for result in ordered] == list(users)
        return ordered


def resolve_request(
    *users: str, min_epoch: int = 0, request_id: int = 0
) -> registry_service_pb2.ResolveManagersRequest:
    return registry_service_pb2.ResolveManagersRequest(
        request_id=request_id,
        users=[
            registry_service_pb2.UserQuery(user=user_key(user), min_epoch=min_epoch)
            for user in users
        ],
    )


def user_key(user: str) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id="acme", user_id=user)


class Clients:
    """Makes clients and closes them all at the end of the test."""

    def __init__(self, registry: RegistryProcess) -> None:
        self._registry = registry
        self._made: list[Client] = []

    def node(self, node_id: str) -> NodeClient:
        return self._keep(NodeClient(self._registry, node_id))

    def edge(self, edge_id: str) -> EdgeClient:
        return self._keep(EdgeClient(self._registry, edge_id))

    def of(self, role: Role, cluster: str = CLUSTER) -> Client:
        return self._keep(Client(self._registry, role, cluster=cluster))

    def _keep(self, client: Any) -> Any:
        self._made.append(client)
        return client

    async def close(self) -> None:
        for client in self._made:
            await client.close()


@pytest_asyncio.fixture
async def clients(registry: RegistryProcess) -> AsyncIterator[Clients]:
    made = Clients(registry)
    yield made
    await made.close()


@pytest.fixture
def until() -> Callable[..., Any]:
    """`await until(condition)`: polls with a deadline; the condition may be async."""

    async def wait(condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            result = condition()
            if inspect.isawaitable(result):
                result = await result
            if result:
                return result
            assert time.monotonic() < deadline, "the condition did not become true"
            await asyncio.sleep(0.02)

    return wait
