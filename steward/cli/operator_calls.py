"""Control-plane calls of the operator's commands, and of `steward up` itself.

Made with an operator's role token that is signed by the cluster's control key: whoever
can read the key is an operator. It decides nothing; the services do.
"""

import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from steward.cli.cluster_file import CLUSTER_NAME
from steward.errors import Reason, StewardError
from steward.model.evidence import clean
from steward.model.keys import UserKey
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.rpc.status import error_of, is_unreachable
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
MOST_DETAIL_CHARS = 160
MOVE_TIMEOUT_S = 40.0
CENSUS_TIMEOUT_S = 30.0
LEDGER_TIMEOUT_S = 600.0
"""A planned move waits for a running tool call, within the node's own limit."""


class Operator:
    """Control-plane calls as the operator; every call has a deadline. An async context manager.

    Calls raise StewardError. One channel per address, closed at the end.
    """

    def __init__(self, key: Ed25519PrivateKey, cluster: str = CLUSTER_NAME) -> None:
        self._credentials = RoleCredentials(key, Role.OPERATOR, cluster, f"operator-{os.getpid()}")
        self._channels: dict[str, grpc.aio.Channel] = {}

    @classmethod
    def of_data(cls, data: Path, cluster: str = CLUSTER_NAME) -> Self:
        """The operator of a data directory; its control key is made when there is none yet."""
        return cls(load_or_create_key(data, CONTROL_KEY), cluster)

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
        response: auth_service_pb2.CreateLoginResponse = await self._call(
            auth, stub.CreateLogin, request
        )
        return response.code

    async def report_death(self, registry: str, node_id: str, pid: int, evidence: str) -> bool:
        """Tell the registry that a node's process was reaped. True when it was fenced by this."""
        stub = self._registry(registry)
        request = registry_service_pb2.ReportDeathRequest(
            node_id=node_id, pid=pid, evidence=evidence
        )
        response: registry_service_pb2.ReportDeathResponse = await self._call(
            registry, stub.ReportDeath, request
        )
        return response.fenced

    async def find_placement(
        self, registry: str, user: UserKey
    ) -> registry_service_pb2.FindPlacementResponse:
        """Where a user's manager is; places nobody."""
        stub = self._registry(registry)
        request = registry_service_pb2.FindPlacementRequest(user=_wire(user))
        response: registry_service_pb2.FindPlacementResponse = await self._call(
            registry, stub.FindPlacement, request
        )
        return response

    async def describe_cluster(self, registry: str) -> registry_service_pb2.DescribeClusterResponse:
        """Nodes and counts as the registry has them."""
        stub = self._registry(registry)
        response: registry_service_pb2.DescribeClusterResponse = await self._call(
            registry, stub.DescribeCluster, registry_service_pb2.DescribeClusterRequest()
        )
        return response

    async def count_connections(
        self, registry: str, users: Sequence[UserKey] = ()
    ) -> registry_service_pb2.CountConnectionsResponse:
        """Open connections at every edge, also those of each of these users (at most 512)."""
        stub = self._registry(registry)
        request = registry_service_pb2.CountConnectionsRequest(users=map(_wire, users))
        response: registry_service_pb2.CountConnectionsResponse = await self._call(
            registry, stub.CountConnections, request
        )
        return response

    async def first_placements(self, registry: str, most: int) -> list[placement_pb2.Placement]:
        """Placements that there are, the first ones by user, at most so many."""
        stub = self._registry(registry)
        request = registry_service_pb2.WatchPlacementsRequest(include_current=True)
        call = stub.WatchPlacements(
            request, metadata=call_metadata(self._credentials), timeout=CALL_TIMEOUT_S
        )
        found: list[placement_pb2.Placement] = []
        try:
            async for response in call:
                found += response.current.placements
                last = response.HasField("current") and not response.current.more
                if last or len(found) >= most:
                    return found[:most]
            return found
        except grpc.aio.AioRpcError as failure:
            raise _error(registry, failure) from None
        finally:
            call.cancel()

    async def drain_node(
        self, registry: str, node_id: str
    ) -> registry_service_pb2.DrainNodeResponse:
        """Place nobody on the node any more; how many users are still to be moved. Idempotent."""
        stub = self._registry(registry)
        request = registry_service_pb2.DrainNodeRequest(node_id=node_id)
        response: registry_service_pb2.DrainNodeResponse = await self._call(
            registry, stub.DrainNode, request
        )
        return response

    async def fence_node(self, registry: str, node_id: str, cause: str) -> int:
        """End the node's incarnation now (evidence E); the incarnation."""
        stub = self._registry(registry)
        request = registry_service_pb2.FenceNodeRequest(node_id=node_id, cause=cause)
        response: registry_service_pb2.FenceNodeResponse = await self._call(
            registry, stub.FenceNode, request
        )
        return response.node_rev

    async def move_user(
        self, registry: str, user: UserKey, node_id: str
    ) -> registry_service_pb2.MoveUserResponse:
        """Move a user to a node (empty: any other) and wait until it is there."""
        stub = self._registry(registry)
        request = registry_service_pb2.MoveUserRequest(user=_wire(user), node_id=node_id)
        response: registry_service_pb2.MoveUserResponse = await self._call(
            registry, stub.MoveUser, request, MOVE_TIMEOUT_S
        )
        return response

    async def evict_user(self, registry: str, user: UserKey, cause: str) -> int:
        """End a user's sessions and put the manager away; the epoch that is over."""
        stub = self._registry(registry)
        request = registry_service_pb2.EvictUserRequest(user=_wire(user), cause=cause)
        response: registry_service_pb2.EvictUserResponse = await self._call(
            registry, stub.EvictUser, request, MOVE_TIMEOUT_S
        )
        return response.epoch

    async def list_violations(
        self, registry: str, request: registry_service_pb2.ListViolationsRequest
    ) -> registry_service_pb2.ListViolationsResponse:
        """A page of recorded violations."""
        stub = self._registry(registry)
        response: registry_service_pb2.ListViolationsResponse = await self._call(
            registry, stub.ListViolations, request
        )
        return response

    async def report_violation(self, registry: str, kind: str, evidence: str) -> None:
        """Put a refusal on record that this process saw."""
        stub = self._registry(registry)
        seen = registry_service_pb2.Violation(kind=kind, evidence=evidence)
        request = registry_service_pb2.ReportViolationsRequest(violations=[seen])
        await self._call(registry, stub.ReportViolations, request)

    async def watch_violations(
        self, registry: str, after: int
    ) -> AsyncIterator[registry_service_pb2.Violation]:
        """Violations after a number, as they are recorded; raises StewardError when it breaks."""
        stub = self._registry(registry)
        request = registry_service_pb2.WatchViolationsRequest(after=after)
        try:
            async for response in stub.WatchViolations(
                request, metadata=call_metadata(self._credentials)
            ):
                for violation in response.violations:
                    yield violation
        except grpc.aio.AioRpcError as failure:
            raise _error(registry, failure) from None

    async def take_census(
        self, registry: str, *, last: bool = False
    ) -> registry_service_pb2.TakeCensusResponse:
        """A census of now, or the last one that was taken."""
        stub = self._registry(registry)
        request = registry_service_pb2.TakeCensusRequest(last=last)
        response: registry_service_pb2.TakeCensusResponse = await self._call(
            registry, stub.TakeCensus, request, CENSUS_TIMEOUT_S
        )
        return response

    async def check_ledger(self, registry: str) -> registry_service_pb2.CheckLedgerResponse:
        """The whole ledger against all fences of the log; the result, when all is read."""
        stub = self._registry(registry)
        call = stub.CheckLedger(
            registry_service_pb2.CheckLedgerRequest(),
            timeout=LEDGER_TIMEOUT_S,
            metadata=call_metadata(self._credentials),
        )
        last = registry_service_pb2.CheckLedgerResponse()
        try:
            async for response in call:
                last = response
        except grpc.aio.AioRpcError as failure:
            raise _error(registry, failure) from None
        if not last.done:
            raise StewardError(Reason.STORE_UNAVAILABLE, "the check of the ledger was cut off")
        return last

    async def last_sequence(self, node: str, user: UserKey) -> int:
        """The last stored sequence of a user's stream, read through an agent node."""
        stub = agent_service_pb2_grpc.AgentServiceStub(self._channel(node))
        request = agent_service_pb2.ReadEventsRequest(user=_wire(user), limit=1, newest=True)
        response: agent_service_pb2.ReadEventsResponse = await self._call(
            node, stub.ReadEvents, request
        )
        return response.head

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = make_channel(address)
        return channel

    def _registry(self, address: str) -> "registry_service_pb2_grpc.RegistryServiceAsyncStub":
        return registry_service_pb2_grpc.RegistryServiceStub(self._channel(address))

    async def _call(
        self, address: str, method: Any, request: object, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        try:
            return await method(
                request, timeout=timeout_s, metadata=call_metadata(self._credentials)
            )
        except grpc.aio.AioRpcError as failure:
            raise _error(address, failure) from None


def _error(address: str, failure: grpc.aio.AioRpcError) -> StewardError:
    """The refusal; when the call got nowhere, an error that says where it went."""
    error = error_of(failure)
    if not is_unreachable(failure):
        return error
    late = failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    # gRPC says a lot; behind these words is what the system said.
    said = clean(error.message).rpartition("last error: ")[2]
    why = "not in time" if late else said[:MOST_DETAIL_CHARS]
    return StewardError(
        Reason.MANAGER_UNAVAILABLE, f"no answer from {address}: check the address ({why})"
    )


def _wire(user: UserKey) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id=user.tenant, user_id=user.user)
