"""A link against a node that answers as the test says, on a real socket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge.core.commands import Answer
from edge.uplink.carriers import PREFACE
from edge.uplink.link import NodeLink
from edge.uplink.port import NodeListener
from steward.model.keys import NodeId, NodeIncarnation, NodeRev
from steward.rpc.frames import LENGTH_BYTES
from steward.rpc.roles import Role, RoleCredentials
from steward.v1 import agent_service_pb2 as pb

pytestmark = pytest.mark.asyncio

NODE = NodeIncarnation(NodeId("node-0"), NodeRev(3))
BOUND_S = 5.0


class Holder:
    """Owner and listener of one link; `drop_at` answers it is dropped."""

    def __init__(self, drop_at: int = 0) -> None:
        self.listener = cast(NodeListener, self)
        key = Ed25519PrivateKey.generate()
        self.credentials = RoleCredentials(key, Role.EDGE, "test", "edge-0")
        self.link: NodeLink | None = None
        self.answers: list[int] = []
        self.welcomes = 0
        self.why = asyncio.get_running_loop().create_future()
        self._drop_at = drop_at

    def hello(self, incarnation: NodeIncarnation) -> pb.EdgeStreamHello:
        return pb.EdgeStreamHello(cluster="test", edge_id="edge-0", node_rev=incarnation.node_rev)

    def opened(self, link: NodeLink) -> None:
        self.welcomes += 1

    def heard(self, link: NodeLink) -> None: ...

    def echoed(self, link: NodeLink, number: int) -> None: ...

    def ended(self, link: NodeLink, why: str) -> None:
        self.why.set_result(why)

    def answered(self, answers: list[Answer]) -> None:
        self.answers += [answer.command_id for answer in answers]
        if len(self.answers) == self._drop_at and self.link is not None:
            self.link.dropped = True
            self.link.close()


@asynccontextmanager
async def linked(holder: Holder, node_rev: int, answers: int) -> AsyncIterator[None]:
    """A link to a node that says all it has to say in one write."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(PREFACE))
        size = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
        await reader.readexactly(size)
        said: list[Any] = [{"welcome": {"node_id": "node-0", "node_rev": node_rev}}]
        said += [{"batch": {"answers": [{"command_id": n}]}} for n in range(1, answers + 1)]
        for fields in said:
            message = pb.HoldEdgeStreamResponse(**fields).SerializeToString()
            writer.write(len(message).to_bytes(LENGTH_BYTES, "big") + message)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    holder.link = NodeLink(NODE, f"127.0.0.1:{port}", holder)
    try:
        yield
    finally:
        holder.link.close()
        await asyncio.wait({holder.link.task})
        server.close()
        await server.wait_closed()


async def test_nothing_that_came_already_is_passed_on_by_a_link_that_is_dropped() -> None:
    holder = Holder(drop_at=2)
    async with linked(holder, NODE.node_rev, answers=5):
        await asyncio.wait_for(holder.why, BOUND_S)
    assert holder.answers == [1, 2]


async def test_another_incarnation_at_the_address_of_a_node_is_not_heard() -> None:
    holder = Holder()
    async with linked(holder, NODE.node_rev + 1, answers=5):
        why = await asyncio.wait_for(holder.why, BOUND_S)
    assert "another incarnation" in why
    assert (holder.welcomes, holder.answers) == (0, [])
