"""The stream of an edge over real gRPC: probes come back, and a node that is over says nothing."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent_service.log.memory import MemoryLog
from agent_service.server import ALLOWED, AgentServicer
from steward.model.keys import UserKey
from steward.rpc.factory import make_channel, make_server
from steward.rpc.roles import Role, RoleCredentials, RoleVerifier
from steward.v1 import agent_service_pb2 as pb
from steward.v1 import placement_pb2
from steward.v1.agent_service_pb2_grpc import (
    AgentServiceStub,
    add_AgentServiceServicer_to_server,
)

ALICE = UserKey("default", "alice")
BOUND_S = 5.0


class EdgeEnd:
    """The other end of one stream."""

    def __init__(self, stub: Any, metadata: Any) -> None:
        self.stub = stub
        self.metadata = metadata
        self.call = stub.HoldEdgeStream(metadata=metadata)
        self.command_id = 0

    async def hello(self) -> None:
        hello = pb.EdgeStreamHello(cluster="test", edge_id="edge-0")
        await self.call.write(pb.HoldEdgeStreamRequest(hello=hello))
        assert (await self.read()).welcome.node_id == "node-0"

    async def read(self) -> Any:
        return await asyncio.wait_for(self.call.read(), BOUND_S)

    async def attach(self, epoch: int) -> None:
        self.command_id += 1
        user = placement_pb2.UserKey(tenant_id=ALICE.tenant, user_id=ALICE.user)
        command = pb.EdgeCommand(
            user=user, epoch=epoch, command_id=self.command_id, attach=pb.Attach()
        )
        batch = pb.CommandBatch(commands=[command])
        await self.call.write(pb.HoldEdgeStreamRequest(commands=batch))

    async def probe(self, number: int) -> None:
        await self.call.write(pb.HoldEdgeStreamRequest(probe=pb.StreamProbe(number=number)))


@pytest_asyncio.fixture
async def served(make_node: Any) -> AsyncIterator[tuple[Any, EdgeEnd]]:
    """A node behind its real server, and an edge that has said hello."""
    log = MemoryLog()
    node = make_node(log)
    key = Ed25519PrivateKey.generate()
    server = make_server(RoleVerifier(key, "test"), ALLOWED)
    servicer = AgentServicer(node.host, log, "test")
    servicer.incarnation = node.incarnation
    add_AgentServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with make_channel(f"127.0.0.1:{port}") as channel:
            credentials = RoleCredentials(key, Role.EDGE, "test", "edge-0")
            metadata = (("authorization", f"Bearer {credentials.token()}"),)
            edge = EdgeEnd(AgentServiceStub(channel), metadata)
            await edge.hello()
            yield node, edge
            edge.call.cancel()
    finally:
        await server.stop(0)


@pytest.mark.asyncio
async def test_a_probe_comes_back_behind_the_answers_that_were_before_it(served: Any) -> None:
    node, edge = served
    node.place(7)
    await edge.attach(7)
    answers = (await edge.read()).batch
    assert answers.answers[0].attached.stream_id
    await edge.attach(7)
    await edge.probe(5)
    seen: list[str] = []
    while "probe 5" not in seen:
        batch = (await edge.read()).batch
        seen += ["attached" for _ in batch.answers]
        seen += [f"probe {number}" for number in batch.probes]
    assert seen == ["attached", "probe 5"]


@pytest.mark.asyncio
async def test_what_waits_in_a_stream_when_its_node_is_over_is_not_sent(served: Any) -> None:
    node, edge = served
    node.place(7)
    await edge.attach(7)
    await edge.read()
    # In one turn of the loop: something is put, and then the node learns that it is over.
    (stream,) = node.host._edges._edges.values()
    stream.probed(1)
    node.host.fence("over")
    assert await edge.read() is grpc.aio.EOF


@pytest.mark.asyncio
async def test_a_node_that_is_over_is_asked_in_vain(served: Any) -> None:
    node, edge = served
    node.host.fence("over")
    user = placement_pb2.UserKey(tenant_id=ALICE.tenant, user_id=ALICE.user)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await edge.stub.ReadEvents(
            pb.ReadEventsRequest(user=user), metadata=edge.metadata, timeout=BOUND_S
        )
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    again = EdgeEnd(edge.stub, edge.metadata)
    hello = pb.EdgeStreamHello(cluster="test", edge_id="edge-0")
    await again.call.write(pb.HoldEdgeStreamRequest(hello=hello))
    with pytest.raises(grpc.aio.AioRpcError):
        await again.read()
