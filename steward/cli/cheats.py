"""The cheats that `steward attack` plays: what a broken or hostile part would try.

Each works with what such a part has: the control key (a node, an edge), or a user's token
(a client). It raises `CheatWorked` when something of it had an effect; it returns what
refused it. That it is on record as a violation is checked by the command.

They touch users of a tenant of their own (`attack`) and join one node that takes at most
one user and drains at once; it is fenced when the cheat ends.
"""

import asyncio
import contextlib
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from steward.cli.operator_calls import Operator
from steward.cli.target import Target
from steward.model.keys import UserKey
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.roles import Role, RoleCredentials
from steward.tokens import mint
from steward.v1 import (
    agent_service_pb2 as agent,
)
from steward.v1 import (
    agent_service_pb2_grpc,
    log_service_pb2_grpc,
    placement_pb2,
    registry_service_pb2_grpc,
)
from steward.v1 import (
    log_service_pb2 as log,
)
from steward.v1 import (
    registry_service_pb2 as registry,
)

STEP_S = 5.0
TENANT = "attack"


class CheatWorked(Exception):
    """A guard did not hold. Says which effect was seen."""


@dataclass(frozen=True, slots=True)
class Doors:
    """What of a cluster is played against, and the key that makes its users' tokens.

    `log` is a gRPC address, `url` that of an edge; by `host` edges reach this machine.
    """

    log: str
    url: str
    users: Ed25519PrivateKey
    host: str = "127.0.0.1"


class Field:
    """A running cluster, as an attacker inside of it sees it."""

    def __init__(self, target: Target, doors: Doors, http: aiohttp.ClientSession) -> None:
        self.registry = target.registry
        self.cluster = target.cluster
        self.log = doors.log
        self.url = doors.url
        self.host = doors.host
        self.http = http
        self.operator = Operator(target.key, target.cluster)
        self._control = target.key
        self._users = doors.users
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def close(self) -> None:
        await self.operator.close()
        for channel in self._channels.values():
            await channel.close()

    def metadata(self, role: Role) -> tuple[tuple[str, str], ...]:
        """What a stolen control key gives: a call as any role."""
        name = f"attacker-{os.getpid()}"
        return call_metadata(RoleCredentials(self._control, role, self.cluster, name))

    def channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = make_channel(address)
        return self._channels[address]

    def token(self, user: UserKey) -> str:
        return mint(self._users, user, 300)

    def new_user(self) -> UserKey:
        return UserKey(TENANT, f"victim-{secrets.token_hex(4)}")

    @contextlib.asynccontextmanager
    async def socket(self, user: UserKey) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """An honest connection of a user, up to its `ready`."""
        async with self.http.ws_connect(
            f"{self.url}/v1/connect",
            headers={"Authorization": f"Bearer {self.token(user)}"},
            protocols=["steward.v1"],
        ) as socket:
            ready = await frame(socket, "ready")
            socket.ready = ready  # type: ignore[attr-defined]
            yield socket

    async def say(self, socket: aiohttp.ClientWebSocketResponse, text: str) -> None:
        """A message, and its run to the end."""
        message = {"type": "user_message", "id": secrets.token_hex(8), "content": text}
        await socket.send_json(message)
        await frame(socket, "agent_completed")

    async def placement(self, user: UserKey) -> placement_pb2.Placement:
        found = await self.operator.find_placement(self.registry, user)
        if not found.HasField("placement"):
            raise RuntimeError(f"{user} is not placed")
        return found.placement

    async def other_node(self, node_id: str) -> tuple[str, int]:
        """Address and incarnation of a node that is not this one."""
        described = await self.operator.describe_cluster(self.registry)
        for node in described.nodes:
            if node.node_id != node_id and not node.draining:
                return node.address, node.node_rev
        raise RuntimeError("there is only one node: this cheat needs two")

    async def ask_log(self, batch: log.LogBatch) -> log.LogAnswers:
        """What the log answers to a node that sends this."""
        stub = log_service_pb2_grpc.LogServiceStub(self.channel(self.log))
        call: Any = stub.HoldLogStream(metadata=self.metadata(Role.AGENT))
        try:
            hello = log.LogHello(cluster=self.cluster, node_id="attacker")
            await call.write(log.HoldLogStreamRequest(hello=hello))
            await asyncio.wait_for(call.read(), STEP_S)
            await call.write(log.HoldLogStreamRequest(batch=batch))
            answered: log.HoldLogStreamResponse = await asyncio.wait_for(call.read(), STEP_S)
            return answered.answers
        finally:
            call.cancel()

    @contextlib.asynccontextmanager
    async def edge_stream(self, address: str, node_rev: int) -> AsyncIterator[Any]:
        """A stream to a node, as an edge has it."""
        stub = agent_service_pb2_grpc.AgentServiceStub(self.channel(address))
        call = stub.HoldEdgeStream(metadata=self.metadata(Role.EDGE))
        try:
            hello = agent.EdgeStreamHello(
                cluster=self.cluster, edge_id="attacker", node_rev=node_rev, version="0"
            )
            await call.write(agent.HoldEdgeStreamRequest(hello=hello))
            await asyncio.wait_for(call.read(), STEP_S)
            yield call
        finally:
            call.cancel()


async def frame(socket: aiohttp.ClientWebSocketResponse, kind: str) -> dict[str, Any]:
    """The next frame of a type. Raises TimeoutError."""
    async with asyncio.timeout(STEP_S * 2):
        while True:
            message = await socket.receive()
            if message.type is not aiohttp.WSMsgType.TEXT:
                raise RuntimeError(f"the socket ended with {socket.close_code}")
            found: dict[str, Any] = json.loads(message.data)
            if found["type"] == kind:
                return found


def wire(user: UserKey) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id=user.tenant, user_id=user.user)


# ---- the cheats


async def direct_construction(field: Field) -> str:
    """Make a manager past its host."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "steward.testing.direct_construction"),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    ways = [json.loads(line) for line in output.splitlines()]
    made = [way["way"] for way in ways if not way["refused"]]
    if made or not ways:
        raise CheatWorked(f"not refused: {', '.join(made) or 'nothing was tried'}")
    await field.operator.report_violation(
        field.registry, "direct_construction", f"{len(ways)} ways, all refused"
    )
    return f"{len(ways)} ways, each a RuntimeError and an audit event"


async def _attach(field: Field, address: str, node_rev: int, user: UserKey, epoch: int) -> str:
    """Ask a node for a manager under an epoch; the reason why it was refused."""
    async with field.edge_stream(address, node_rev) as call:
        command = agent.EdgeCommand(
            user=wire(user), epoch=epoch, command_id=1, attach=agent.Attach()
        )
        batch = agent.CommandBatch(commands=[command])
        await call.write(agent.HoldEdgeStreamRequest(commands=batch))
        async with asyncio.timeout(STEP_S):
            while True:
                response = await call.read()
                if response is grpc.aio.EOF:
                    return "the stream was ended"
                for answer in response.batch.answers:
                    if answer.WhichOneof("body") == "attached":
                        raise CheatWorked(f"attached under epoch {answer.epoch}")
                    if answer.WhichOneof("body") == "refused":
                        return str(answer.refused.refusal.reason)


async def forged_placement(field: Field) -> str:
    """Attach under an epoch that was never granted."""
    user = field.new_user()
    async with field.socket(user) as socket:
        placed = await field.placement(user)
        why = await _attach(field, placed.address, placed.node_rev, user, placed.epoch + 1000)
        await field.say(socket, "still mine?")
        return why


async def placement_for_another_node(field: Field) -> str:
    """Attach at a node where the user is not placed, with the right epoch."""
    user = field.new_user()
    async with field.socket(user) as socket:
        placed = await field.placement(user)
        address, node_rev = await field.other_node(placed.node_id)
        why = await _attach(field, address, node_rev, user, placed.epoch)
        await field.say(socket, "still mine?")
        return why


async def _false_append(
    field: Field, *, behind: int = 0, number: int = 1, beyond: int = 0
) -> log.AppendAnswer:
    """Write to a user's stream, `behind` epochs too low, `beyond` the next sequence."""
    user = field.new_user()
    async with field.socket(user) as socket:
        await field.say(socket, "hello")
        placed = await field.placement(user)
        before = await field.operator.last_sequence(placed.address, user)
        append = log.AppendEvents(
            request_id=1,
            user=wire(user),
            epoch=placed.epoch - behind,
            append_number=number,
            expected_sequence=before + 1 + beyond,
            events=[log.StoredEvent(payload=b'{"type":"custom"}')],
        )
        answer = (await field.ask_log(log.LogBatch(appends=[append]))).appends[0]
        if await field.operator.last_sequence(placed.address, user) != before:
            raise CheatWorked("the stream grew")
        await field.say(socket, "still mine?")
        return answer


async def stale_epoch_append(field: Field) -> str:
    """Write to a user's stream under an epoch that is over."""
    answer = await _false_append(field, behind=1)
    if answer.WhichOneof("result") != "fenced":
        raise CheatWorked(f"the log answered {answer}")
    return f"fenced by {answer.fenced.fence}"


async def sequence_gap(field: Field) -> str:
    """Write past the next sequence, under the right epoch."""
    answer = await _false_append(field, number=1_000_000, beyond=4)
    if answer.WhichOneof("result") == "committed":
        raise CheatWorked(f"the log answered {answer}")
    return f"conflict at {answer.conflict.next_sequence}"


async def two_nodes_claim_one_user(field: Field) -> str:
    """Begin a second manager of a user under the epoch of the first."""
    user = field.new_user()
    async with field.socket(user) as socket:
        await field.say(socket, "hello")
        placed = await field.placement(user)
        seal = log.SealStream(
            request_id=1, user=wire(user), epoch=placed.epoch, activation="attacker"
        )
        answers = await field.ask_log(log.LogBatch(seals=[seal]))
        if answers.seals[0].WhichOneof("result") != "fenced":
            raise CheatWorked("the log sealed the stream for a second manager")
        await field.say(socket, "still mine?")
        return f"fenced by {answers.seals[0].fenced.fence}"


async def foreign_user_in_a_frame(field: Field) -> str:
    """Name another user in a message."""
    user, other = field.new_user(), field.new_user()
    async with field.socket(user) as socket:
        await socket.send_json(
            {"type": "user_message", "id": "x", "content": "hello", "user_id": other.user}
        )
        error = await frame(socket, "error")
        if error["reason"] != "PROTOCOL_VIOLATION":
            raise CheatWorked(f"answered {error}")
        return str(error["message"])


async def foreign_origin(field: Field) -> str:
    """Connect from a page of somebody else."""
    user = field.new_user()
    try:
        async with field.http.ws_connect(
            f"{field.url}/v1/connect",
            headers={"Authorization": f"Bearer {field.token(user)}"},
            origin="https://evil.example",
            protocols=["steward.v1"],
        ):
            raise CheatWorked("the upgrade was accepted")
    except aiohttp.WSServerHandshakeError as refused:
        if refused.status != 403:
            raise CheatWorked(f"answered {refused.status}") from None
        return "HTTP 403"


async def replayed_ticket(field: Field) -> str:
    """Use a one-use ticket twice."""
    user = field.new_user()
    headers = {"Authorization": f"Bearer {field.token(user)}"}
    async with field.http.post(f"{field.url}/v1/tickets", headers=headers) as answer:
        ticket = (await answer.json())["ticket"]
    address = f"{field.url}/v1/connect?ticket={ticket}"
    async with field.http.ws_connect(address, protocols=["steward.v1"]) as socket:
        await frame(socket, "ready")
        try:
            async with field.http.ws_connect(address, protocols=["steward.v1"]):
                raise CheatWorked("the ticket was taken twice")
        except aiohttp.WSServerHandshakeError as refused:
            if refused.status != 401:
                raise CheatWorked(f"answered {refused.status}") from None
            return "HTTP 401"


class _FalseNode(agent_service_pb2_grpc.AgentServiceServicer):
    """A node that joins like any other and, on each edge's stream, says what it should not."""

    def __init__(self) -> None:
        self.node_id = f"attacker-{secrets.token_hex(3)}"
        self.node_rev = 0
        self.edges: list[asyncio.Queue[agent.NodeBatch]] = []
        self.came = asyncio.Event()

    async def HoldEdgeStream(
        self, request_iterator: AsyncIterator[agent.HoldEdgeStreamRequest], _: Any
    ) -> AsyncIterator[agent.HoldEdgeStreamResponse]:
        await anext(aiter(request_iterator))
        box: asyncio.Queue[agent.NodeBatch] = asyncio.Queue(64)
        self.edges.append(box)
        welcome = agent.NodeStreamWelcome(node_id=self.node_id, node_rev=self.node_rev)
        yield agent.HoldEdgeStreamResponse(welcome=welcome)
        self.came.set()

        async def echo() -> None:
            async for request in request_iterator:
                if request.WhichOneof("body") == "probe":
                    await box.put(agent.NodeBatch(probes=[request.probe.number]))

        echoing = asyncio.ensure_future(echo())
        try:
            while True:
                yield agent.HoldEdgeStreamResponse(batch=await box.get())
        finally:
            echoing.cancel()
            await asyncio.gather(echoing, return_exceptions=True)


@contextlib.asynccontextmanager
async def _false_node(field: Field) -> AsyncIterator[_FalseNode]:
    """Join a false node, wait for an edge's stream; it is gone (and fenced) at the end."""
    node = _FalseNode()  # type: ignore[abstract]  # It serves nothing else.
    server = grpc.aio.server()
    agent_service_pb2_grpc.add_AgentServiceServicer_to_server(node, server)
    port = server.add_insecure_port(f"{field.host}:0")
    await server.start()
    stub = registry_service_pb2_grpc.RegistryServiceStub(field.channel(field.registry))
    call = stub.HoldNodeSession(metadata=field.metadata(Role.AGENT))
    living: asyncio.Future[None] | None = None
    try:
        hello = registry.NodeHello(
            cluster=field.cluster,
            node_id=node.node_id,
            boot_id="attack",
            nonce=secrets.token_hex(16),
            address=f"{field.host}:{port}",
            capacity=1,
            version="0",
            pid=os.getpid(),
        )
        await call.write(registry.HoldNodeSessionRequest(hello=hello))
        welcome: Any = await asyncio.wait_for(call.read(), STEP_S)
        node.node_rev = welcome.welcome.node_rev
        await call.write(registry.HoldNodeSessionRequest(drain=registry.AnnounceDrain()))

        async def live() -> None:
            for number in range(1_000):
                beat = registry.NodeBeat(beat=number, log_reachable=True)
                await call.write(registry.HoldNodeSessionRequest(beat=beat))
                renew = registry.RenewLease(renewal=number)
                await call.write(registry.HoldNodeSessionRequest(renew=renew))
                await asyncio.sleep(0.2)

        living = asyncio.ensure_future(live())
        await asyncio.wait_for(node.came.wait(), STEP_S)
        yield node
    finally:
        if living is not None:
            living.cancel()
            await asyncio.gather(living, return_exceptions=True)
        call.cancel()
        await server.stop(0)


async def _false_delivery(field: Field, *, behind: int) -> str:
    """Deliver a forged event for a user who is attached elsewhere, `behind` epochs too low."""
    user = field.new_user()
    async with _false_node(field) as node, field.socket(user) as socket:
        await field.say(socket, "hello")
        placed = await field.placement(user)
        head = await field.operator.last_sequence(placed.address, user)
        forged = agent.Delivery(
            user=wire(user),
            epoch=placed.epoch - behind,
            first_sequence=head + 1,
            last_sequence=head + 1,
            events=[b'{"type":"custom","sequence":%d,"forged":true}' % (head + 1)],
        )
        for box in node.edges:
            await box.put(agent.NodeBatch(deliveries=[forged]))
        await socket.send_json({"type": "ping", "t": 1})
        message = {"type": "user_message", "id": secrets.token_hex(8), "content": "still mine?"}
        await socket.send_json(message)
        async with asyncio.timeout(STEP_S * 2):
            while True:
                got = json.loads((await socket.receive()).data)
                if got.get("forged"):
                    raise CheatWorked("the forged event was shown")
                if got["type"] == "agent_completed":
                    return "dropped by the edge; the next real event was shown in its place"


async def stale_epoch_delivery(field: Field) -> str:
    """Deliver under an epoch that is over."""
    return await _false_delivery(field, behind=1)


async def delivery_by_another_node(field: Field) -> str:
    """Deliver under the right epoch, from a node that the user is not attached to."""
    return await _false_delivery(field, behind=0)


@dataclass(frozen=True, slots=True)
class Cheat:
    """A cheat, and the kinds of violation that it must end as."""

    name: str
    play: Callable[[Field], Awaitable[str]]
    kinds: frozenset[str]

    @property
    def summary(self) -> str:
        return (self.play.__doc__ or "").splitlines()[0]


def _cheat(name: str, play: Callable[[Field], Awaitable[str]], *kinds: str) -> Cheat:
    return Cheat(name, play, frozenset(kinds))


CHEATS = (
    _cheat("direct-construction", direct_construction, "direct_construction"),
    _cheat("forged-placement", forged_placement, "forged_epoch"),
    _cheat("stale-epoch-append", stale_epoch_append, "stale_append"),
    _cheat("stale-epoch-delivery", stale_epoch_delivery, "stale_delivery", "foreign_delivery"),
    _cheat("delivery-by-another-node", delivery_by_another_node, "foreign_delivery"),
    _cheat("placement-for-another-node", placement_for_another_node, "unknown_placement"),
    _cheat("foreign-user-in-a-frame", foreign_user_in_a_frame, "foreign_user"),
    _cheat("foreign-origin", foreign_origin, "foreign_origin"),
    _cheat("replayed-ticket", replayed_ticket, "replayed_ticket"),
    _cheat("two-nodes-one-user", two_nodes_claim_one_user, "stale_seal", "second_manager"),
    _cheat("sequence-gap", sequence_gap, "append_conflict", "stale_append"),
)
