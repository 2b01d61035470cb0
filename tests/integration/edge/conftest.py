"""A real edge over real gRPC: own registry and node servers, a real auth process, raw sockets."""

import asyncio
import base64
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import pytest_asyncio
import uvloop

from edge.convert import user_of, user_to_proto
from edge.core.commands import (
    Accepted,
    AnnounceClient,
    Answer,
    Attach,
    Attached,
    CancelAccepted,
    CancelRun,
    ClientTaken,
    Delivery,
    Detach,
    EdgeCommand,
    InputAccepted,
    ManagerLost,
    Refused,
    SubmitInput,
    SubmitMessage,
)
from edge.server.service import EdgeService
from edge.settings import EdgeSettings
from edge.uplink.memory import MemoryCluster, MemoryNode
from edge.uplink.port import EventRange
from steward.errors import StewardError
from steward.model.census import Held
from steward.model.keys import Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.rpc.factory import make_server
from steward.rpc.keys import CONTROL_KEY, USER_KEY, load_or_create_key
from steward.rpc.outbox import Outbox
from steward.rpc.roles import Role, RoleVerifier
from steward.rpc.status import abort
from steward.tokens import mint
from steward.v1 import (
    agent_service_pb2,
    agent_service_pb2_grpc,
    placement_pb2,
    registry_service_pb2,
    registry_service_pb2_grpc,
)

CLUSTER = "edge-test"
DEADLINE_S = 10.0


async def eventually(condition: Callable[[], object], what: str) -> None:
    """Poll until something is true; fails with `what` if it never is."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + DEADLINE_S
    while not condition():
        assert loop.time() < deadline, f"not within {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that edges run on."""
    return {"uvloop": uvloop.new_event_loop}


# ---- the auth service, a process of its own


@dataclass(frozen=True)
class AuthProcess:
    data: Path
    address: str

    def token(self, user: str = "alice", tenant: str = "default", ttl_s: int = 600) -> str:
        return mint(load_or_create_key(self.data, USER_KEY), UserKey(tenant, user), ttl_s)


@pytest.fixture(scope="session")
def auth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AuthProcess]:
    data = tmp_path_factory.mktemp("auth")
    port, ops_port = free_port(), free_port()
    command = [sys.executable, "-m", "auth_service", "--id", "auth-1", "--cluster", CLUSTER]
    command += ["--data", str(data), "--grpc-port", str(port), "--ops-port", str(ops_port)]
    process = subprocess.Popen([*command, "--parent-pid", str(os.getpid())])
    deadline = time.monotonic() + DEADLINE_S
    try:
        while not _ready(ops_port):
            assert process.poll() is None and time.monotonic() < deadline, "auth did not start"
            time.sleep(0.02)
        yield AuthProcess(data, f"127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def _ready(ops_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{ops_port}/readyz", timeout=1):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


# ---- registry and nodes that speak the real protos


def _placement(placement: Placement) -> placement_pb2.Placement:
    return placement_pb2.Placement(
        user=user_to_proto(placement.user),
        epoch=placement.epoch,
        node_id=placement.node_id,
        node_rev=placement.node_rev,
        address=placement.address,
    )


def _cluster_nodes(
    nodes: Mapping[NodeIncarnation, str],
) -> registry_service_pb2.HoldEdgeSessionResponse:
    response = registry_service_pb2.HoldEdgeSessionResponse()
    response.nodes.SetInParent()
    for incarnation, address in nodes.items():
        response.nodes.nodes.add(
            node_id=incarnation.node_id, node_rev=incarnation.node_rev, address=address
        )
    return response


class RegistryPeer(registry_service_pb2_grpc.RegistryServiceServicer):
    """`HoldEdgeSession` over a `MemoryCluster`; pushes to every edge."""

    def __init__(self, cluster: MemoryCluster) -> None:
        self._cluster = cluster
        self._outboxes: set[Outbox[registry_service_pb2.HoldEdgeSessionResponse]] = set()
        self.violations: list[registry_service_pb2.Violation] = []
        self.counts: list[registry_service_pb2.ReportConnections] = []
        cluster.registry_listeners.append(self)

    async def ReportViolations(self, request: Any, context: Any) -> Any:
        self.violations.extend(request.violations)
        return registry_service_pb2.ReportViolationsResponse(last_number=len(self.violations))

    async def HoldEdgeSession(self, request_iterator: Any, context: Any) -> Any:
        outbox: Outbox[registry_service_pb2.HoldEdgeSessionResponse] = Outbox()
        hello = await anext(request_iterator)
        assert hello.hello.edge_id and hello.hello.cluster == CLUSTER
        self._outboxes.add(outbox)
        outbox.put(
            registry_service_pb2.HoldEdgeSessionResponse(
                welcome=registry_service_pb2.EdgeWelcome(registry_id="registry-1")
            )
        )
        outbox.put(_cluster_nodes(self._cluster.addresses()))
        reading = asyncio.ensure_future(self._read(request_iterator, outbox))
        try:
            while items := await outbox.take(1):
                yield items[0]
        finally:
            self._outboxes.discard(outbox)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, requests: Any, outbox: Any) -> None:
        async for request in requests:
            if request.WhichOneof("body") == "unreachable":
                report = request.unreachable
                self._cluster.unreachable.append(NodeIncarnation(report.node_id, report.node_rev))
                continue
            if request.WhichOneof("body") == "connections":
                self.counts.append(request.connections)
                continue
            response = registry_service_pb2.HoldEdgeSessionResponse()
            response.resolved.request_id = request.resolve.request_id
            for query in request.resolve.users:
                result = response.resolved.results.add(user=query.user)
                placed = self._cluster.resolve(user_of(query.user), query.min_epoch)
                if isinstance(placed, StewardError):
                    result.refusal.reason = placed.reason.value
                    result.refusal.message = placed.message
                else:
                    result.placement.CopyFrom(_placement(placed))
            outbox.put(response)

    def cluster_nodes(self, nodes: Mapping[NodeIncarnation, str]) -> None:
        for outbox in self._outboxes:
            outbox.put(_cluster_nodes(nodes))

    def attachments(self) -> Iterator[Held]:
        return iter(())

    def count_connections(self, users: Sequence[UserKey]) -> tuple[int, list[int]]:
        raise NotImplementedError("a registry asks, and is not asked")

    def ask_connections(self, question: int, *users: UserKey) -> None:
        asked = registry_service_pb2.AskConnections(
            question=question, users=[user_to_proto(user) for user in users]
        )
        for outbox in self._outboxes:
            outbox.put(registry_service_pb2.HoldEdgeSessionResponse(ask_connections=asked))

    def user_evicted(self, user: UserKey, cause: str) -> None:
        evicted = registry_service_pb2.UserEvicted(user=user_to_proto(user), cause=cause)
        for outbox in self._outboxes:
            outbox.put(registry_service_pb2.HoldEdgeSessionResponse(evicted=evicted))

    def node_fenced(self, incarnation: NodeIncarnation, cause: str) -> None:
        for outbox in self._outboxes:
            outbox.put(
                registry_service_pb2.HoldEdgeSessionResponse(
                    node_fenced=registry_service_pb2.NodeFenced(
                        node_id=incarnation.node_id, node_rev=incarnation.node_rev, cause=cause
                    )
                )
            )

    def placement_moved(self, placement: Placement) -> None:
        for outbox in self._outboxes:
            outbox.put(
                registry_service_pb2.HoldEdgeSessionResponse(
                    moved=registry_service_pb2.PlacementMoved(placement=_placement(placement))
                )
            )


class EdgeSide:
    """One edge stream at a node: `EdgePort` in, protos out."""

    def __init__(self) -> None:
        # A number is that of a probe, on its way back.
        self.outbox: Outbox[Answer | Delivery | int] = Outbox()

    def answer(self, answer: Answer) -> None:
        self.outbox.put(answer)

    def deliver(self, delivery: Delivery) -> None:
        self.outbox.put(delivery)


class NodePeer(agent_service_pb2_grpc.AgentServiceServicer):
    """One node's server over a `MemoryCluster`. Several incarnations may share it."""

    def __init__(self, cluster: MemoryCluster) -> None:
        self._cluster = cluster
        self.node: MemoryNode | None = None
        # True: probes do not come back.
        self.deaf = False
        self.sides: set[EdgeSide] = set()

    async def HoldEdgeStream(self, request_iterator: Any, context: Any) -> Any:
        hello = (await anext(request_iterator)).hello
        node = self.node
        assert node is not None and hello.node_rev == node.incarnation.node_rev
        side = EdgeSide()
        self.sides.add(side)
        welcome = agent_service_pb2.NodeStreamWelcome(
            node_id=node.incarnation.node_id, node_rev=node.incarnation.node_rev
        )
        yield agent_service_pb2.HoldEdgeStreamResponse(welcome=welcome)
        reading = asyncio.ensure_future(self._read(request_iterator, node, side))
        try:
            while items := await side.outbox.take(256):
                yield agent_service_pb2.HoldEdgeStreamResponse(batch=_batch(items))
        finally:
            self.sides.discard(side)
            for edges in node.attached.values():
                if side in edges:
                    edges.remove(side)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, requests: Any, node: MemoryNode, side: EdgeSide) -> None:
        async for request in requests:
            if request.WhichOneof("body") == "probe" and not self.deaf:
                side.outbox.put(request.probe.number)
            for proto in request.commands.commands:
                self._cluster.command(node, side, _command(proto))

    async def ReadEvents(self, request: Any, context: Any) -> Any:
        wanted = EventRange(
            request.after, request.until, request.limit, request.thread_id, request.newest
        )
        try:
            page = self._cluster.read(user_of(request.user), wanted)
        except StewardError as error:
            await abort(context, error)
        return agent_service_pb2.ReadEventsResponse(
            stream_id=page.stream_id,
            events=page.events,
            sequences=page.sequences,
            head=page.head,
            oldest_sequence=page.oldest,
            more=page.more,
        )

    async def ListThreads(self, request: Any, context: Any) -> Any:
        page = self._cluster.threads(user_of(request.user))
        return agent_service_pb2.ListThreadsResponse(
            threads=[
                agent_service_pb2.Thread(
                    thread_id=t.thread_id, sequence=t.sequence, updated_at=t.updated_at
                )
                for t in page.threads
            ]
        )


def _command(proto: agent_service_pb2.EdgeCommand) -> EdgeCommand:
    body: Any
    match proto.WhichOneof("body"):
        case "attach":
            body = Attach()
        case "detach":
            body = Detach()
        case "submit_message":
            m = proto.submit_message
            body = SubmitMessage(m.id, m.content, m.thread_id, m.agent, m.overlap)
        case "announce_client":
            body = AnnounceClient(proto.announce_client.client_id)
        case "cancel_run":
            body = CancelRun(proto.cancel_run.run_id, proto.cancel_run.thread_id)
        case _:
            body = SubmitInput(proto.submit_input.request_id, proto.submit_input.value)
    return EdgeCommand(
        user_of(proto.user), Epoch(proto.epoch), proto.command_id, proto.traceparent, body
    )


def _batch(items: list[Answer | Delivery | int]) -> agent_service_pb2.NodeBatch:
    batch = agent_service_pb2.NodeBatch()
    for item in items:
        if isinstance(item, int):
            batch.probes.append(item)
            continue
        if isinstance(item, Delivery):
            batch.deliveries.add(
                user=user_to_proto(item.user),
                epoch=item.epoch,
                first_sequence=item.first,
                last_sequence=item.first + len(item.events) - 1,
                events=item.events,
            )
            continue
        answer = batch.answers.add(
            user=user_to_proto(item.user), epoch=item.epoch, command_id=item.command_id
        )
        match item.body:
            case Attached(stream_id, sequence, oldest):
                answer.attached.stream_id = stream_id
                answer.attached.sequence = sequence
                answer.attached.oldest_sequence = oldest
            case Accepted(id, run_id, sequence, duplicate, queue_position):
                answer.accepted.id = id
                answer.accepted.run_id = run_id
                answer.accepted.sequence = sequence
                answer.accepted.duplicate = duplicate
                answer.accepted.queue_position = queue_position
            case CancelAccepted(run_id):
                answer.cancel_accepted.run_id = run_id
            case InputAccepted(request_id):
                answer.input_accepted.request_id = request_id
            case ClientTaken(client_id):
                answer.client_taken.client_id = client_id
            case ManagerLost(reason, known_epoch):
                answer.manager_lost.reason = reason
                answer.manager_lost.known_epoch = known_epoch
            case Refused(reason, message, retry_after_ms, known_epoch):
                answer.refused.refusal.reason = reason.value
                answer.refused.refusal.message = message
                answer.refused.refusal.retry_after_ms = retry_after_ms
                answer.refused.known_epoch = known_epoch
    return batch


class Swallower:
    """A TCP proxy that, when told so, takes every byte and passes none on: nothing breaks."""

    def __init__(self) -> None:
        self.swallows = False
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()

    async def start(self, port: int) -> int:
        """Pass on to `port`; the port to connect to."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there = await asyncio.open_connection("127.0.0.1", port)
            for source, target in ((reader, there[1]), (there[0], writer)):
                pipe = asyncio.create_task(self._pipe(source, target))
                self._pipes.add(pipe)
                pipe.add_done_callback(self._pipes.discard)

        self._server = await asyncio.start_server(serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for pipe in list(self._pipes):
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    async def _pipe(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                if not self.swallows:
                    target.write(data)
                    await target.drain()
        except ConnectionError:
            pass
        finally:
            target.close()


class Peers:
    """A registry server and node servers around one `MemoryCluster`."""

    def __init__(self, data: Path) -> None:
        self.cluster = MemoryCluster()
        self.peer = RegistryPeer(self.cluster)
        self._verifier = RoleVerifier(load_or_create_key(data, CONTROL_KEY), CLUSTER)
        self._servers: list[grpc.aio.Server] = []
        self.node_servers: dict[NodeIncarnation, tuple[grpc.aio.Server, NodePeer]] = {}
        self.registry = ""

    async def start(self) -> None:
        service, edges = "/steward.v1.RegistryService/", frozenset({Role.EDGE})
        names = ("HoldEdgeSession", "ReportViolations")
        server = make_server(self._verifier, {service + name: edges for name in names})
        registry_service_pb2_grpc.add_RegistryServiceServicer_to_server(self.peer, server)
        self.registry = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._servers.append(server)

    async def add_node(self, name: str, through: "Swallower | None" = None) -> MemoryNode:
        """Start a node's server. `through`: edges reach it by that proxy alone."""
        service = "/steward.v1.AgentService/"
        edges = frozenset({Role.EDGE})
        names = ("HoldEdgeStream", "ReadEvents", "ListThreads")
        server = make_server(self._verifier, {service + method: edges for method in names})
        peer = NodePeer(self.cluster)
        agent_service_pb2_grpc.add_AgentServiceServicer_to_server(peer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        if through is not None:
            port = await through.start(port)
        peer.node = self.cluster.add_node(name, f"127.0.0.1:{port}")
        self.node_servers[peer.node.incarnation] = (server, peer)
        return peer.node

    @property
    def violations(self) -> list[registry_service_pb2.Violation]:
        """What edges put on record."""
        return self.peer.violations

    async def kill(self, node: MemoryNode) -> None:
        """The node's server is gone; the registry does not know it yet."""
        server, _ = self.node_servers.pop(node.incarnation)
        await server.stop(0)

    def streams(self, node: MemoryNode) -> int:
        """How many edges hold a stream to this node."""
        return len(self.node_servers[node.incarnation][1].sides)

    async def stop(self) -> None:
        for server in (*self._servers, *(server for server, _ in self.node_servers.values())):
            await server.stop(0)


# ---- the edge


@dataclass
class EdgeUnderTest:
    """An edge in this process, its peers, and a client."""

    service: EdgeService
    peers: Peers
    auth: AuthProcess
    http: aiohttp.ClientSession
    raws: list["RawSocket"] = field(default_factory=list)

    eventually = staticmethod(eventually)

    @staticmethod
    def make(opcode: int, payload: bytes) -> bytes:
        """A client frame, for what is sent behind a handshake."""
        return RawSocket.make(opcode, payload)

    @property
    def cluster(self) -> MemoryCluster:
        return self.peers.cluster

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.service.port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def bearer(self, user: str = "alice", **kwargs: Any) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.auth.token(user, **kwargs)}"}

    @contextlib.asynccontextmanager
    async def socket(
        self, user: str = "alice", query: str = "", **options: Any
    ) -> AsyncIterator["Socket"]:
        """A connected WebSocket of the aiohttp client; its `ready` was read."""
        url = f"{self.url}/v1/connect{query}"
        async with self.http.ws_connect(url, headers=self.bearer(user), **options) as ws:
            client = Socket(ws)
            client.ready = await client.frame()
            assert client.ready["type"] == "ready"
            yield client

    async def raw(
        self, user: str = "alice", query: str = "", behind: bytes = b"", receive_buffer: int = 0
    ) -> "RawSocket":
        """A WebSocket by hand; `behind` is sent in the same segment as the handshake.

        `receive_buffer` bytes: what the kernel takes for a client that does not read.
        """
        connection = socket.socket()
        connection.setblocking(False)
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        address = ("127.0.0.1", self.service.port)
        await asyncio.get_running_loop().sock_connect(connection, address)
        raw = RawSocket(*await asyncio.open_connection(sock=connection))
        self.raws.append(raw)
        await raw.handshake(self.host, self.auth.token(user), query, behind)
        return raw


class Socket:
    """Frames of one aiohttp WebSocket, as objects."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.ready: dict[str, Any] = {}

    async def send(self, **frame: Any) -> None:
        await self.ws.send_str(json.dumps(frame))

    async def frame(self) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE_S):
            message = await self.ws.receive()
        assert message.type is aiohttp.WSMsgType.TEXT, message
        frame: dict[str, Any] = json.loads(message.data)
        return frame

    async def until(self, kind: str) -> dict[str, Any]:
        """The next frame of a type; the ones before it are dropped."""
        while (frame := await self.frame())["type"] != kind:
            pass
        return frame

    async def sequences(self, count: int) -> list[int]:
        """The sequences of the next `count` events."""
        found: list[int] = []
        while len(found) < count:
            frame = await self.frame()
            if "event_id" in frame:
                found.append(frame["sequence"])
        return found

    async def close_code(self) -> int | None:
        """Read to the end; how the server closed."""
        async with asyncio.timeout(DEADLINE_S):
            while (await self.ws.receive()).type is aiohttp.WSMsgType.TEXT:
                pass
        return self.ws.close_code


class RawSocket:
    """A WebSocket client that may break every rule."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.head = b""

    async def handshake(self, host: str, token: str, query: str, behind: bytes) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET /v1/connect{query} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            f"Authorization: Bearer {token}\r\n\r\n"
        )
        self.writer.write(request.encode() + behind)
        async with asyncio.timeout(DEADLINE_S):
            self.head = await self.reader.readuntil(b"\r\n\r\n")
        assert self.head.startswith(b"HTTP/1.1 101 "), self.head

    @staticmethod
    def make(opcode: int, payload: bytes, *, fin: bool = True, reserved: int = 0) -> bytes:
        first = (0x80 if fin else 0) | reserved | opcode
        size = len(payload)
        if size < 126:
            head = bytes((first, 0x80 | size))
        elif size < 65536:
            head = bytes((first, 0xFE)) + struct.pack("!H", size)
        else:
            head = bytes((first, 0xFF)) + struct.pack("!Q", size)
        mask = b"\x0a\x0b\x0c\x0d"
        return head + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload))

    async def read(self) -> tuple[int, bytes]:
        """The next frame of the server: opcode and payload. EOF: (-1, b'')."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                first, size = await self.reader.readexactly(2)
                if size == 126:
                    (size,) = struct.unpack("!H", await self.reader.readexactly(2))
                elif size == 127:
                    (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
                return first & 0x0F, await self.reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            return -1, b""

    async def text(self) -> dict[str, Any]:
        opcode, payload = await self.read()
        assert opcode == 1, (opcode, payload)
        frame: dict[str, Any] = json.loads(payload)
        return frame

    async def close_code(self) -> int:
        """Read until the server's close frame; its code. -1: it closed without one."""
        while True:
            opcode, payload = await self.read()
            if opcode == 8:
                return int.from_bytes(payload[:2], "big")
            if opcode == -1:
                return -1

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


MakeEdge = Callable[..., Any]


@pytest_asyncio.fixture
async def make_edge(auth: AuthProcess) -> AsyncIterator[MakeEdge]:
    """Starts edges: `await make_edge(heartbeat_seconds=1)`. All are stopped at the end.

    `peers` of an edge that was made before: one more edge of the same cluster.
    """
    started: list[EdgeUnderTest] = []
    base = EdgeSettings(
        id="edge-1", cluster=CLUSTER, data=auth.data, port=0, auth=auth.address, drain_spread_ms=50
    )

    async def make(peers: Peers | None = None, **changes: Any) -> EdgeUnderTest:
        if peers is None:
            peers = Peers(auth.data)
            await peers.start()
            await peers.add_node("node-1")
        settings = replace(base, **{"registry": peers.registry, **changes})
        service = EdgeService(settings)
        await service.start()
        edge = EdgeUnderTest(service, peers, auth, aiohttp.ClientSession())
        started.append(edge)
        if not changes.keys() & {"registry", "auth"}:
            await eventually(lambda: service.unready() is None, "the edge is ready")
        return edge

    yield make
    for edge in started:
        await edge.http.close()
        for raw in edge.raws:
            await raw.close()
        await edge.service.stop()
    for edge in started:
        await edge.peers.stop()


@pytest_asyncio.fixture
async def swallower() -> AsyncIterator[Swallower]:
    """A proxy for a node that is to fall silent."""
    proxy = Swallower()
    yield proxy
    await proxy.stop()


@pytest_asyncio.fixture
async def edge(make_edge: MakeEdge) -> EdgeUnderTest:
    """An edge with default settings, ready."""
    made: EdgeUnderTest = await make_edge()
    return made
