"""Operators' commands over gRPC: what nodes and edges are told, and what is refused."""

import asyncio
from typing import Any

import grpc
import pytest

from steward.errors import Reason
from steward.rpc.roles import Role
from steward.rpc.status import error_of
from steward.v1 import placement_pb2
from steward.v1 import registry_service_pb2 as pb

pytestmark = pytest.mark.asyncio

NODE_REQUEST = pb.HoldNodeSessionRequest


def user_key(user: str) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id="acme", user_id=user)


class Operator:
    def __init__(self, client: Any) -> None:
        self._client = client

    async def call(self, method: str, request: Any) -> Any:
        call = getattr(self._client.stub, method)
        return await call(request, metadata=self._client.metadata(), timeout=15)

    async def refused(self, method: str, request: Any) -> Reason:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self.call(method, request)
        return error_of(refused.value).reason


@pytest.fixture
def operator(clients: Any) -> Operator:
    return Operator(clients.of(Role.OPERATOR))


async def two_nodes_and_an_edge(clients: Any) -> tuple[Any, Any, Any]:
    """Users that are resolved now are on the first node: the second joins later."""
    first = clients.node("n1")
    await first.join()
    edge = clients.edge("e1")
    await edge.connect()
    await edge.resolve("ann", "bob")
    second = clients.node("n2")
    await second.join()
    return first, second, edge


async def hand_off(node: Any, count: int, *, activate: bool = False) -> str:
    """Let go of so many users as a node does that has written their handoffs; the cause."""
    left = count
    while left:
        asked = await node.open.next("hand_off", "granted", "renewed", "released")
        left -= len(asked.users)
        placements = [
            pb.ReleasedPlacement(
                user=owned.user,
                epoch=owned.epoch,
                cause="handoff",
                handoff=True,
                activate=activate,
            )
            for owned in asked.users
        ]
        await node.open.send(
            NODE_REQUEST(release=pb.ReleasePlacements(request_id=1, placements=placements))
        )
    return str(asked.cause)


async def test_a_move_asks_the_node_and_tells_the_new_one_and_the_edge(
    clients: Any, operator: Operator
) -> None:
    first, second, edge = await two_nodes_and_an_edge(clients)
    (before, _) = await edge.resolve("ann", "bob")
    moving = asyncio.create_task(
        operator.call("MoveUser", pb.MoveUserRequest(user=user_key("ann"), node_id="n2"))
    )
    assert await hand_off(first, 1, activate=True) == "move"
    moved = await moving
    assert (moved.from_node, moved.placement.node_id) == ("n1", "n2")
    assert moved.placement.epoch > before.placement.epoch
    granted = await second.open.expect("granted")
    assert granted.activate and list(granted.placements) == [moved.placement]
    assert (await edge.open.expect("moved")).placement == moved.placement
    found = await operator.call("FindPlacement", pb.FindPlacementRequest(user=user_key("bob")))
    assert (found.placement.node_id, list(found.edges)) == ("n1", ["e1"])


async def test_a_drain_moves_all_users_and_edges_see_the_nodes(
    clients: Any, operator: Operator
) -> None:
    first, second, edge = await two_nodes_and_an_edge(clients)
    drained = await operator.call("DrainNode", pb.DrainNodeRequest(node_id="n1"))
    assert (drained.node_rev, drained.placements) == (first.node_rev, 2)
    nodes: dict[str, bool] = {}
    while nodes != {"n1": True, "n2": False}:
        seen = await edge.open.next("nodes")
        nodes = {node.node_id: node.draining for node in seen.nodes}
    members: list[str] = []
    while members != ["n2"]:
        members = list((await second.open.next("members", "renewed")).node_ids)
    assert await hand_off(first, 2) == "drain"
    for _ in range(2):
        assert (await edge.open.expect("moved")).placement.node_id == "n2"


async def test_a_fence_by_an_operator_ends_the_incarnation(
    clients: Any, operator: Operator
) -> None:
    first, _, edge = await two_nodes_and_an_edge(clients)
    request = pb.FenceNodeRequest(node_id="n1", cause="smoke")
    assert (await operator.call("FenceNode", request)).node_rev == first.node_rev
    fenced = await first.open.next("fenced", "granted", "renewed")
    assert (fenced.node_rev, fenced.cause) == (first.node_rev, "smoke")
    assert (await edge.open.expect("node_fenced")).node_id == "n1"
    (ledger,) = (await operator.call("ReadLedger", pb.ReadLedgerRequest(limit=1))).entries
    assert (ledger.kind, ledger.cause) == ("fence", "smoke")
    assert ledger.evidence.startswith("E: ")


async def test_an_evicted_user_loses_sessions_and_manager(clients: Any, operator: Operator) -> None:
    first, _, edge = await two_nodes_and_an_edge(clients)
    (ann,) = await edge.resolve("ann")
    epoch = ann.placement.epoch
    evicting = asyncio.create_task(
        operator.call("EvictUser", pb.EvictUserRequest(user=user_key("ann"), cause="spam"))
    )
    evicted = await edge.open.expect("evicted")
    assert (evicted.user, evicted.cause) == (user_key("ann"), "spam")
    (owned,) = (await first.open.next("evict", "granted", "renewed")).users
    assert (owned.user, owned.epoch) == (user_key("ann"), epoch)
    released = pb.ReleasedPlacement(user=owned.user, epoch=epoch, cause="evicted")
    await first.open.send(
        NODE_REQUEST(release=pb.ReleasePlacements(request_id=2, placements=[released]))
    )
    assert (await evicting).epoch == epoch
    found = await operator.call("FindPlacement", pb.FindPlacementRequest(user=user_key("ann")))
    assert not found.HasField("placement")


async def test_an_orphan_is_placed_and_its_manager_is_made_at_once(clients: Any) -> None:
    node = clients.node("n1")
    await node.join()
    await node.open.send(NODE_REQUEST(adopt=pb.AdoptUsers(users=[user_key("lost")])))
    activate = False
    while not activate:
        granted = await node.open.expect("granted")
        assert [placement.user for placement in granted.placements] == [user_key("lost")]
        activate = granted.activate


async def test_a_log_that_is_ahead_of_the_registry_raises_the_generation(
    clients: Any, operator: Operator, registry: Any
) -> None:
    assert registry.stop() == 0
    await asyncio.to_thread(registry.start, **{"log-floor": "true"})
    node = clients.node("n1")
    node.log_head = 1_000_000
    await node.join()
    # Whoever had joined before is of the lost past, and comes again as a new process.
    assert (await node.open.expect("fenced")).cause == "generation raised"
    await node.die()
    again = clients.node("n1")
    again.log_head = 1_000_000
    await again.join()
    edge = clients.edge("e1")
    await edge.connect()
    # An edge that was away for the push is told when it comes.
    assert (await edge.open.expect("node_fenced")).node_rev == node.node_rev
    (ann,) = await edge.resolve("ann")
    assert ann.placement.epoch > 1 << 48
    assert ann.placement.node_rev == again.node_rev > 1 << 48
    listed = await operator.call(
        "ListViolations", pb.ListViolationsRequest(severity=pb.SEVERITY_BREACH)
    )
    assert [v.kind for v in listed.violations] == ["fence_above_registry"]
    assert listed.breaches == 1


async def test_commands_about_nothing_are_refused_and_change_nothing(
    clients: Any, operator: Operator
) -> None:
    first, _, edge = await two_nodes_and_an_edge(clients)
    (before, _) = await edge.resolve("ann", "bob")
    nowhere, ann, node = user_key("nobody"), user_key("ann"), "n9"
    unknown: tuple[tuple[str, Any], ...] = (
        ("DrainNode", pb.DrainNodeRequest(node_id=node)),
        ("FenceNode", pb.FenceNodeRequest(node_id=node)),
        ("MoveUser", pb.MoveUserRequest(user=nowhere)),
        ("MoveUser", pb.MoveUserRequest(user=ann, node_id=node)),
        ("EvictUser", pb.EvictUserRequest(user=nowhere)),
    )
    for method, request in unknown:
        assert await operator.refused(method, request) is Reason.NOT_FOUND, method
    bad = placement_pb2.UserKey(tenant_id="acme", user_id="x" * 129)
    malformed: tuple[tuple[str, Any], ...] = (
        ("DrainNode", pb.DrainNodeRequest(node_id="")),
        ("FenceNode", pb.FenceNodeRequest(node_id="a\nb")),
        ("MoveUser", pb.MoveUserRequest(user=bad)),
        ("MoveUser", pb.MoveUserRequest(user=ann, node_id="n" * 129)),
        ("EvictUser", pb.EvictUserRequest()),
        ("FindPlacement", pb.FindPlacementRequest(user=bad)),
        ("ReportDeath", pb.ReportDeathRequest(node_id="", pid=1)),
    )
    for method, request in malformed:
        assert await operator.refused(method, request) is Reason.PROTOCOL_VIOLATION, method
    assert (await edge.resolve("ann"))[0].placement == before.placement
    assert first.open.error is None
