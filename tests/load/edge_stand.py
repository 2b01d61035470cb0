"""What an edge talks to, for measuring an edge alone: a registry and one node, on real wires.

    python -m tests.load.edge_stand --data DIR [--carrier grpc]

A process of its own, so that its work is not counted as the edge's. It places every user on
its one node, answers attaches, and pushes events to all users that are attached, on the streams
of a real node: framed connections, or gRPC alone when told so. It stores nothing: what a log and a
manager cost is not measured here.
Every violation that an edge reports is counted; a measurement with one is void.

It reads one JSON object a line (`{"push": ROUNDS, "burst": N, "size": BYTES}`, perhaps with
`at_once`; `{"ask": 1}`) and answers each with one. It ends with its standard input.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import uvloop

from agent_service.core.commands import AttachEdge, DetachEdge
from agent_service.core.effects import AnswerAttached, Deliver
from agent_service.edge_streams import EdgeStreams
from agent_service.framed import PREFACE, FramedEdges
from agent_service.host.edges import EdgeCommand
from agent_service.host.host import ManagerHost
from agent_service.host.ports import EdgePort
from agent_service.log.memory import MemoryLog
from agent_service.server import AgentServicer
from steward.model.keys import (
    EdgeId,
    Epoch,
    NodeId,
    NodeIncarnation,
    NodeRev,
    Sequence,
    StreamId,
    UserKey,
)
from steward.rpc.factory import make_server
from steward.rpc.front import LOOPBACK, Front
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleVerifier
from steward.v1 import agent_service_pb2_grpc, placement_pb2, registry_service_pb2_grpc
from steward.v1 import registry_service_pb2 as registry_pb

CLUSTER = "edge-load"
NODE_ID, NODE_REV, EPOCH = "node-1", 1, Epoch(1)
AT_ONCE = 64
"""Deliveries that are put in one turn of the loop: about what waits when a node is busy."""


class Registry(registry_service_pb2_grpc.RegistryServiceServicer):
    """Every user is on the one node, under epoch 1."""

    def __init__(self) -> None:
        self.address = ""
        self.violations: list[str] = []

    async def ReportViolations(self, request: Any, context: Any) -> Any:
        self.violations += [violation.evidence for violation in request.violations]
        return registry_pb.ReportViolationsResponse(last_number=len(self.violations))

    async def HoldEdgeSession(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        await anext(requests)
        response = registry_pb.HoldEdgeSessionResponse
        yield response(welcome=registry_pb.EdgeWelcome(registry_id="registry-1"))
        node = placement_pb2.Node(node_id=NODE_ID, node_rev=NODE_REV, address=self.address)
        yield response(nodes=registry_pb.ClusterNodes(nodes=[node]))
        async for request in requests:
            if request.WhichOneof("body") == "resolve":
                resolved = registry_pb.ResolveManagersResponse(
                    request_id=request.resolve.request_id
                )
                for query in request.resolve.users:
                    placement = placement_pb2.Placement(
                        user=query.user,
                        epoch=EPOCH,
                        node_id=NODE_ID,
                        node_rev=NODE_REV,
                        address=self.address,
                    )
                    resolved.results.add(user=query.user, placement=placement)
                yield response(resolved=resolved)


class Side:
    """One edge: who is attached, with the last sequence."""

    def __init__(self, edge: EdgePort) -> None:
        self.edge = edge
        self.sequences: dict[str, int] = {}

    def deliver(self, user: str, events: list[bytes]) -> None:
        """These are the next events of the user."""
        first = self.sequences[user] + 1
        last = self.sequences[user] = first + len(events) - 1
        deliver = Deliver((self.edge.edge_id,), Sequence(first), Sequence(last), tuple(events))
        self.edge.deliver(UserKey("default", user), EPOCH, deliver)


class Node:
    """The host of the one node: it has a manager for everybody."""

    def __init__(self) -> None:
        self._sides: dict[EdgeId, Side] = {}

    @property
    def sides(self) -> list[Side]:
        return list(self._sides.values())

    def edge_opened(self, edge: EdgePort) -> None:
        self._sides[edge.edge_id] = Side(edge)

    def edge_closed(self, edge_id: EdgeId) -> None:
        self._sides.pop(edge_id, None)

    def is_silent(self) -> bool:
        return False

    def command(self, user: UserKey, epoch: Epoch, command: EdgeCommand, trace: str) -> None:
        side = self._sides[command.edge_id]
        if isinstance(command, AttachEdge):
            sequence = Sequence(side.sequences.setdefault(user.user, 0))
            answer = AnswerAttached(
                command.edge_id, command.command_id, stream_of(user.user), sequence, Sequence(1), 0
            )
            side.edge.answer(user, epoch, answer, Epoch(0))
        elif isinstance(command, DetachEdge):
            side.sequences.pop(user.user, None)

    async def push(self, rounds: int, burst: int, size: int, at_once: int) -> int:
        """`burst` events to every attached user, `rounds` times; how many events in all."""
        sent = 0
        for side in self.sides:
            users = list(side.sequences)
            for _ in range(rounds):
                for count, user in enumerate(users, 1):
                    first = side.sequences[user] + 1
                    side.deliver(user, [event(user, first + n, size) for n in range(burst)])
                    if count % at_once == 0:
                        await asyncio.sleep(0)
                await asyncio.sleep(0)
            sent += rounds * burst * len(users)
        return sent


def stream_of(user: str) -> StreamId:
    return StreamId(f"s-{user}")


def event(user: str, sequence: int, size: int) -> bytes:
    """One event of `size` bytes, with the fields in the order of real ones."""
    head = b'{"type":"text_delta","stream_id":"s-%b","sequence":%d,"text":"' % (
        user.encode(),
        sequence,
    )
    return head.ljust(size - 2, b"x") + b'"}'


Take = Callable[["Node", dict[str, Any]], Awaitable[dict[str, Any] | None]]
"""Carries an order out, and gives the answer; None for one that it does not know."""


async def push(node: Node, order: dict[str, Any]) -> dict[str, Any] | None:
    """The order of this stand."""
    if "push" not in order:
        return None
    at_once = order.get("at_once", AT_ONCE)
    return {"pushed": await node.push(order["push"], order["burst"], order["size"], at_once)}


async def serve(data: Path, take: Take, framed: bool) -> None:
    """Serve until standard input ends."""
    verifier = RoleVerifier(load_or_create_key(data, CONTROL_KEY), CLUSTER)
    registry, node = Registry(), Node()
    methods = {
        "/steward.v1.RegistryService/HoldEdgeSession",
        "/steward.v1.RegistryService/ReportViolations",
        "/steward.v1.AgentService/HoldEdgeStream",
    }
    server = make_server(verifier, dict.fromkeys(methods, frozenset({Role.EDGE})))
    registry_service_pb2_grpc.add_RegistryServiceServicer_to_server(registry, server)
    streams = EdgeStreams(node, CLUSTER)
    streams.incarnation = NodeIncarnation(NodeId(NODE_ID), NodeRev(NODE_REV))
    servicer = AgentServicer(cast(ManagerHost, node), MemoryLog(), streams)
    agent_service_pb2_grpc.add_AgentServiceServicer_to_server(servicer, server)
    grpc_port = server.add_insecure_port(f"{LOOPBACK}:0")
    edges = FramedEdges(streams, verifier)
    front = Front(PREFACE, edges.accept, grpc_port)
    await server.start()
    registry.address = f"{LOOPBACK}:{await front.open(LOOPBACK, 0) if framed else grpc_port}"
    say({"address": registry.address})
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer = await take(node, json.loads(line))
        if answer is None:
            attached = sum(len(side.sequences) for side in node.sides)
            answer = {"violations": registry.violations[:10], "attached": attached}
        say(answer)
    if framed:
        await edges.close(0)
        await front.close()
    await server.stop(0)


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main(take: Take) -> None:
    """Serve, told by standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--carrier", choices=("framed", "grpc"), default="framed")
    options = parser.parse_args()
    uvloop.run(serve(options.data, take, options.carrier == "framed"))


if __name__ == "__main__":
    main(push)
