"""Control-plane calls of the operator's commands, and of `steward up` itself.

Made with an operator's role token that is signed by the cluster's control key: whoever
can read the key is an operator. It decides nothing; the services do.
"""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from steward.cli.cluster_file import CLUSTER_NAME
from steward.model.keys import UserKey
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.rpc.status import error_of
from steward.v1 import (
    agent_service_pb2,
    agent_service_pb2_grpc,
    auth_service_pb2,
    auth_service_pb2_grpc,
    placement_pb2,
    registry_service_pb2,
    registry_service_pb2_grpc,
)

CALL_TIMEOUT_S = 5.0
MOVE_TIMEOUT_S = 40.0
"""A planned move waits for a running tool call, within the node's own limit."""


class Operator:
    """Control-plane calls as the operator; every call has a deadline. An async context manager.

    Calls raise StewardError. One channel per address, closed at the end.
    """

    def __init__(self, data: Path, cluster: str = CLUSTER_NAME) -> None:
        key = load_or_create_key(data, CONTROL_KEY)
        self._credentials = RoleCredentials(key, Role.OPERATOR, cluster, f"operator-{os.getpid()}")
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channels. Safe to call twice."""
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.close()

    async def create_login(self, auth: str, user: UserKey) -> str:
        """A one-use login code for `user`. Not to be retried by itself: each call makes a code."""
        stub = auth_service_pb2_grpc.AuthServiceStub(self._channel(auth))
        request = auth_service_pb2.CreateLoginRequest(user=_wire(user))
        response: auth_service_pb2.CreateLoginResponse = await self._call(stub.CreateLogin, request)
        return response.code

    async def report_death(self, registry: str, node_id: str, pid: int, evidence: str) -> bool:
        """Tell the registry that a node's process was reaped. True when it was fenced by this."""
        stub = registry_service_pb2_grpc.RegistryServiceStub(self._channel(registry))
        request = registry_service_pb2.ReportDeathRequest(
            node_id=node_id, pid=pid, evidence=evidence
        )
        response: registry_service_pb2.ReportDeathResponse = await self._call(
            stub.ReportDeath, request
        )
        return response.fenced

    async def find_placement(
        self, registry: str, user: UserKey
    ) -> registry_service_pb2.FindPlacementResponse:
        """Where a user's manager is; places nobody."""
        stub = registry_service_pb2_grpc.RegistryServiceStub(self._channel(registry))
        request = registry_service_pb2.FindPlacementRequest(user=_wire(user))
        response: registry_service_pb2.FindPlacementResponse = await self._call(
            stub.FindPlacement, request
        )
        return response

    async def describe_cluster(self, registry: str) -> registry_service_pb2.DescribeClusterResponse:
        """Nodes and counts as the registry has them."""
        stub = registry_service_pb2_grpc.RegistryServiceStub(self._channel(registry))
        response: registry_service_pb2.DescribeClusterResponse = await self._call(
            stub.DescribeCluster, registry_service_pb2.DescribeClusterRequest()
        )
        return response

    async def drain_node(
        self, registry: str, node_id: str
    ) -> registry_service_pb2.DrainNodeResponse:
        """Place nobody on the node any more; how many users are still to be moved. Idempotent."""
        stub = registry_service_pb2_grpc.RegistryServiceStub(self._channel(registry))
        request = registry_service_pb2.DrainNodeRequest(node_id=node_id)
        response: registry_service_pb2.DrainNodeResponse = await self._call(stub.DrainNode, request)
        return response

    async def fence_node(self, registry: str, node_id: str, cause: str) -> int:
        """End the node's incarnation now (evidence E); the incarnation."""
        stub = registry_service_pb2_grpc.RegistryServiceStub(self._channel(registry))
        request = registry_service_pb2.FenceNodeRequest(node_id=node_id, cause=cause)
        response: registry_service_pb2.FenceNodeResponse = await self._call(stub.FenceNode, request)
        return response.node_rev

    async def move_user(
        self, registry: str, user: UserKey, node_id: str
    ) -> registry_service_pb2.MoveUserResponse:
        """Move a user to a node (empty: any other) and wait until it is there."""
        stub = registry_service_pb2_grpc.RegistryServiceStub(self._channel(registry))
        request = registry_service_pb2.MoveUserRequest(user=_wire(user), node_id=node_id)
        response: registry_service_pb2.MoveUserResponse = await self._call(
            stub.MoveUser, request, MOVE_TIMEOUT_S
        )
        return response

    async def evict_user(self, registry: str, user: UserKey, cause: str) -> int:
        """End a user's sessions and put the manager away; the epoch that is over."""
        stub = registry_service_pb2_grpc.RegistryServiceStub(self._channel(registry))
        request = registry_service_pb2.EvictUserRequest(user=_wire(user), cause=cause)
        response: registry_service_pb2.EvictUserResponse = await self._call(
            stub.EvictUser, request, MOVE_TIMEOUT_S
        )
        return response.epoch

    async def list_violations(
        self, registry: str, request: registry_service_pb2.ListViolationsRequest
    ) -> registry_service_pb2.ListViolationsResponse:
        """A page of recorded violations."""
        stub = registry_service_pb2_grpc.RegistryServiceStub(self._channel(registry))
        response: registry_service_pb2.ListViolationsResponse = await self._call(
            stub.ListViolations, request
        )
        return response

    async def report_violation(self, registry: str, kind: str, evidence: str) -> None:
        """Put a refusal on record that this process saw."""
        stub = registry_service_pb2_grpc.RegistryServiceStub(self._channel(registry))
        seen = registry_service_pb2.Violation(kind=kind, evidence=evidence)
        request = registry_service_pb2.ReportViolationsRequest(violations=[seen])
        await self._call(stub.ReportViolations, request)

    async def watch_violations(
        self, registry: str, after: int
    ) -> AsyncIterator[registry_service_pb2.Violation]:
        """Violations after a number, as they are recorded; raises StewardError when it breaks."""
        stub = registry_service_pb2_grpc.RegistryServiceStub(self._channel(registry))
        request = registry_service_pb2.WatchViolationsRequest(after=after)
        try:
            async for response in stub.WatchViolations(
                request, metadata=call_metadata(self._credentials)
            ):
                for violation in response.violations:
                    yield violation
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure) from None

    async def last_sequence(self, node: str, user: UserKey) -> int:
        """The last stored sequence of a user's stream, read through an agent node."""
        stub = agent_service_pb2_grpc.AgentServiceStub(self._channel(node))
        request = agent_service_pb2.ReadEventsRequest(user=_wire(user), limit=1, newest=True)
        response: agent_service_pb2.ReadEventsResponse = await self._call(stub.ReadEvents, request)
        return response.head

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = make_channel(address)
        return channel

    async def _call(self, method: Any, request: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        try:
            return await method(
                request, timeout=timeout_s, metadata=call_metadata(self._credentials)
            )
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure) from None


def _wire(user: UserKey) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id=user.tenant, user_id=user.user)
