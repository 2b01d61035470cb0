"""Who may call what, and what the registry takes from outside: over real gRPC, default deny."""

from typing import Any

import grpc
import pytest

from registry_service.server import ALLOWED
from steward.errors import Reason
from steward.rpc.roles import Role
from steward.rpc.status import error_of
from steward.v1 import placement_pb2, registry_service_pb2

pytestmark = pytest.mark.asyncio


@pytest.fixture
def registry(shared_registry: Any) -> Any:
    return shared_registry


def user_key(user: str) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id="acme", user_id=user)


def resolve_request(*users: str) -> registry_service_pb2.ResolveManagersRequest:
    queries = [registry_service_pb2.UserQuery(user=user_key(user)) for user in users]
    return registry_service_pb2.ResolveManagersRequest(users=queries)


async def test_every_method_has_its_row_of_roles() -> None:
    service = registry_service_pb2.DESCRIPTOR.services_by_name["RegistryService"]
    methods = {f"/{service.full_name}/{method.name}" for method in service.methods}
    assert set(ALLOWED) == methods


@pytest.mark.parametrize("role", [Role.EDGE, Role.OPERATOR, Role.AUTH, Role.LOG, Role.REGISTRY])
async def test_only_agents_hold_node_sessions(clients: Any, role: Role) -> None:
    client = clients.of(role)
    session = client.session(client.stub.HoldNodeSession(metadata=client.metadata()))
    await session.end()
    assert session.error is not None
    assert session.error.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("role", [Role.AGENT, Role.OPERATOR, Role.AUTH, Role.LOG])
async def test_only_edges_hold_edge_sessions(clients: Any, role: Role) -> None:
    client = clients.of(role)
    session = client.session(client.stub.HoldEdgeSession(metadata=client.metadata()))
    await session.end()
    assert session.error is not None
    assert error_of(session.error).reason is Reason.PERMISSION_DENIED


@pytest.mark.parametrize("role", [Role.AGENT, Role.EDGE, Role.AUTH, Role.LOG])
async def test_only_operators_look_into_the_cluster(clients: Any, role: Role) -> None:
    client = clients.of(role)
    calls = [
        client.stub.FindPlacement(
            registry_service_pb2.FindPlacementRequest(user=user_key("ann")),
            metadata=client.metadata(),
        ),
        client.stub.DescribeCluster(
            registry_service_pb2.DescribeClusterRequest(), metadata=client.metadata()
        ),
        client.stub.ReportDeath(
            registry_service_pb2.ReportDeathRequest(node_id="n1"), metadata=client.metadata()
        ),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_call_without_a_token_or_with_one_of_another_cluster_is_refused(
    clients: Any,
) -> None:
    stranger = clients.of(Role.EDGE)
    other = clients.of(Role.EDGE, cluster="elsewhere")
    for metadata in ((), (("authorization", "Bearer nonsense"),), other.metadata()):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stranger.stub.ResolveManagers(resolve_request("ann"), metadata=metadata)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_hello_of_another_cluster_is_refused(clients: Any) -> None:
    edge = clients.edge("e1")
    await edge.join(cluster="elsewhere")
    await edge.open.end()
    assert edge.open.error is not None
    assert error_of(edge.open.error).reason is Reason.PERMISSION_DENIED
    node = clients.node("n1")
    session = await node.hello(cluster="elsewhere")
    await session.end()
    assert session.error is not None
    assert error_of(session.error).reason is Reason.PERMISSION_DENIED


async def test_what_no_honest_peer_sends_ends_the_session(clients: Any) -> None:
    edge_request = registry_service_pb2.HoldEdgeSessionRequest
    too_many = resolve_request(*(f"u{n}" for n in range(513)))
    nameless = resolve_request("")
    for message in (edge_request(), edge_request(resolve=too_many), edge_request(resolve=nameless)):
        edge = clients.edge("e1")
        await edge.connect()
        await edge.open.send(message)
        await edge.open.end()
        assert edge.open.error is not None
        assert error_of(edge.open.error).reason is Reason.PROTOCOL_VIOLATION
    node = clients.node("n1")
    session = await node.hello(address="no port")
    await session.end()
    assert session.error is not None
    assert error_of(session.error).reason is Reason.PROTOCOL_VIOLATION
