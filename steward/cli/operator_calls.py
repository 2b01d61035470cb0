"""Control-plane calls of the operator's commands, and of `steward up` itself.

Made with an operator's role token that is signed by the cluster's control key: whoever
can read the key is an operator. It decides nothing; the services do.
"""

import os
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
    auth_service_pb2,
    auth_service_pb2_grpc,
    placement_pb2,
    registry_service_pb2,
    registry_service_pb2_grpc,
)

CALL_TIMEOUT_S = 5.0


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

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = make_channel(address)
        return channel

    async def _call(self, method: Any, request: object) -> Any:
        try:
            return await method(
                request, timeout=CALL_TIMEOUT_S, metadata=call_metadata(self._credentials)
            )
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure) from None


def _wire(user: UserKey) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id=user.tenant, user_id=user.user)
