"""What an edge talks to, for measuring an edge alone: a registry and one node on real gRPC.

    python -m tests.load.edge_stand --data DIR

A process of its own, so that its work is not counted as the edge's. It places every user on
its one node, answers attaches, and pushes events to all users that are attached, in as large
messages as it is told. It stores nothing: what a log and a manager cost is not measured here.
Every violation that an edge reports is counted; a measurement with one is void.

It reads one JSON object a line (`{"push": ROUNDS, "burst": N, "size": BYTES}`, `{"ask": 1}`)
and answers each with one. It ends with its standard input.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

from steward.model.deliveries import HEAD, encode_texts, user_check
from steward.model.keys import UserKey
from steward.rpc.factory import make_server
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.outbox import Outbox
from steward.rpc.roles import Role, RoleVerifier
from steward.v1 import agent_service_pb2 as node_pb
from steward.v1 import agent_service_pb2_grpc, placement_pb2, registry_service_pb2_grpc
from steward.v1 import registry_service_pb2 as registry_pb

CLUSTER = "edge-load"
NODE_ID, NODE_REV, EPOCH = "node-1", 1, 1
PER_MESSAGE = 64
"""Deliveries in one message to the edge: about what waits when a node is busy."""

MOST_WAITING = 8


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


class EdgeSide:
    """One edge's stream: who is attached, with the last sequence, and what goes out."""

    def __init__(self) -> None:
        self.outbox: Outbox[Any] = Outbox()
        self.sequences: dict[str, int] = {}
        self.channels: dict[str, int] = {}
        # Bounds what waits to be sent: an edge that is slower than this process paces it.
        self.room = asyncio.Semaphore(MOST_WAITING)

    def apply(self, commands: Any) -> None:
        batch = node_pb.NodeBatch()
        for command in commands:
            user = command.user.user_id
            kind = command.WhichOneof("body")
            if kind == "attach":
                sequence = self.sequences.setdefault(user, 0)
                self.channels[user] = command.attach.channel
                answer = batch.answers.add(
                    user=command.user, epoch=command.epoch, command_id=command.command_id
                )
                answer.attached.stream_id = stream_of(user)
                answer.attached.sequence = sequence
                answer.attached.oldest_sequence = 1
            elif kind == "detach":
                self.sequences.pop(user, None)
        if batch.answers:
            self.outbox.put(node_pb.HoldEdgeStreamResponse(batch=batch))


class Node(agent_service_pb2_grpc.AgentServiceServicer):
    """The one node."""

    def __init__(self) -> None:
        self.sides: set[EdgeSide] = set()

    async def HoldEdgeStream(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        await anext(requests)
        side = EdgeSide()
        self.sides.add(side)
        welcome = node_pb.NodeStreamWelcome(node_id=NODE_ID, node_rev=NODE_REV)
        yield node_pb.HoldEdgeStreamResponse(welcome=welcome)
        reading = asyncio.create_task(self._read(requests, side))
        try:
            while items := await side.outbox.take(1):
                yield items[0]
                if items[0].batch.heads:
                    side.room.release()
        finally:
            self.sides.discard(side)
            reading.cancel()
            await asyncio.wait({reading})

    async def _read(self, requests: Any, side: EdgeSide) -> None:
        async for request in requests:
            if request.WhichOneof("body") == "probe":
                batch = node_pb.NodeBatch(probes=[request.probe.number])
                side.outbox.put(node_pb.HoldEdgeStreamResponse(batch=batch))
            else:
                side.apply(request.commands.commands)

    async def push(self, rounds: int, burst: int, size: int) -> int:
        """`burst` events to every attached user, `rounds` times; how many events in all."""
        sent = await asyncio.gather(
            *(self._push_to(side, rounds, burst, size) for side in self.sides)
        )
        return sum(sent)

    async def _push_to(self, side: EdgeSide, rounds: int, burst: int, size: int) -> int:
        users = list(side.sequences)
        parts = [users[at : at + PER_MESSAGE] for at in range(0, len(users), PER_MESSAGE)]
        for _ in range(rounds):
            for part in parts:
                await side.room.acquire()
                heads, frames = [], []
                for user in part:
                    first = side.sequences[user] + 1
                    side.sequences[user] = first + burst - 1
                    texts = encode_texts([event(user, first + n, size) for n in range(burst)])
                    check = user_check(UserKey("default", user))
                    channel = side.channels[user]
                    heads.append(HEAD.pack(channel, EPOCH, first, burst, len(texts), check))
                    frames.append(texts)
                batch = node_pb.NodeBatch(heads=b"".join(heads), frames=b"".join(frames))
                side.outbox.put(node_pb.HoldEdgeStreamResponse(batch=batch))
        return rounds * burst * len(users)


def stream_of(user: str) -> str:
    return f"s-{user}"


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
    return {"pushed": await node.push(order["push"], order["burst"], order["size"])}


async def serve(data: Path, take: Take) -> None:
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
    agent_service_pb2_grpc.add_AgentServiceServicer_to_server(node, server)
    registry.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    say({"address": registry.address})
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer = await take(node, json.loads(line))
        if answer is None:
            attached = sum(len(side.sequences) for side in node.sides)
            answer = {"violations": registry.violations[:10], "attached": attached}
        say(answer)
    await server.stop(0)


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main(take: Take) -> None:
    """Serve, told by standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    uvloop.run(serve(parser.parse_args().data, take))


if __name__ == "__main__":
    main(push)
