"""The edge's session with the registry over gRPC (`HoldEdgeSession`).

Resolves wait in one outbox and travel together, at most 512 users in a message. When the
stream breaks, those without an answer are asked again on the next one: a resolve is safe
to repeat. Each ends within `RESOLVE_S`, with a placement or a StewardError.
"""

import asyncio
import logging
from dataclasses import dataclass

from edge.convert import error_of_refusal, nodes_of, placement_of, user_of, user_to_proto
from edge.uplink.port import RegistryListener
from edge.uplink.questions import Questions
from steward.errors import Reason, StewardError
from steward.model.keys import NodeId, NodeIncarnation, NodeRev, UserKey
from steward.model.placement import Placement
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.outbox import Outbox, OutboxClosed, OutboxFull
from steward.rpc.roles import RoleCredentials
from steward.rpc.stream import PeerStream, keep
from steward.v1 import registry_service_pb2 as pb
from steward.v1 import registry_service_pb2_grpc as rpc

RESOLVE_S = 3.0
MOST_USERS = 512

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Query:
    number: int
    user: UserKey
    min_epoch: int
    traceparent: str


# A query, or a message that is ready to go.
_Item = _Query | pb.HoldEdgeSessionRequest


class GrpcRegistry:
    """`edge.uplink.port.Registry` over one stream that is opened again when it breaks."""

    def __init__(
        self,
        address: str,
        credentials: RoleCredentials,
        cluster: str,
        edge_id: str,
        version: str,
        listener: RegistryListener,
    ) -> None:
        self._channel = make_channel(address)
        self._stub = rpc.RegistryServiceStub(self._channel)
        self._credentials = credentials
        self._listener = listener
        self._questions = Questions("the registry", RESOLVE_S)
        self._outbox: Outbox[_Item] = Outbox()
        self._asked: dict[int, _Query] = {}
        # request_id of a message -> the numbers of its queries, in order.
        self._messages: dict[int, list[int]] = {}
        self._last_message = 0
        self._connected = False
        self._was_connected = False
        self._stream: PeerStream[_Item, pb.HoldEdgeSessionRequest, pb.HoldEdgeSessionResponse] = (
            PeerStream(
                open_call=lambda: self._stub.HoldEdgeSession(
                    metadata=call_metadata(self._credentials)
                ),
                hello=pb.HoldEdgeSessionRequest(
                    hello=pb.EdgeHello(cluster=cluster, edge_id=edge_id, version=version)
                ),
                pack=self._pack,
                most=MOST_USERS,
                on_welcome=self._on_welcome,
                on_message=self._on_message,
            )
        )
        self._task = asyncio.create_task(
            keep(self._attempt, lambda: self._was_connected, self._on_down)
        )

    @property
    def connected(self) -> bool:
        return self._connected

    def resolve(
        self, user: UserKey, min_epoch: int, traceparent: str = ""
    ) -> "asyncio.Future[Placement]":
        """See the port."""
        number, future = self._questions.ask()
        query = _Query(number, user, min_epoch, traceparent)
        self._asked[number] = query
        future.add_done_callback(lambda _: self._asked.pop(number, None))
        self._put(query)
        return future

    def report_unreachable(self, incarnation: NodeIncarnation, evidence: str) -> None:
        """See the port. Dropped while the registry is away: it then learns by itself."""
        if self._connected:
            report = pb.ReportUnreachable(
                node_id=incarnation.node_id, node_rev=incarnation.node_rev, evidence=evidence
            )
            self._put(pb.HoldEdgeSessionRequest(unreachable=report))

    async def close(self) -> None:
        """End the session. Safe to call twice."""
        self._task.cancel()
        await asyncio.wait({self._task})
        self._questions.close()
        await self._channel.close()

    def _put(self, item: _Item) -> None:
        try:
            self._outbox.put(item)
        except OutboxClosed:
            pass  # Between two streams; what is asked goes on the next one.
        except OutboxFull:
            self._outbox.close()

    async def _attempt(self) -> None:
        self._was_connected = False
        self._outbox = Outbox()
        for query in list(self._asked.values()):
            self._put(query)
        try:
            await self._stream.hold(self._outbox)
        finally:
            self._connected = False
            self._messages.clear()

    def _on_down(self, error: StewardError) -> None:
        if self._was_connected or error.reason is Reason.PERMISSION_DENIED:
            _log.warning("registry session over: %s", error)

    def _on_welcome(self, message: pb.HoldEdgeSessionResponse) -> None:
        self._connected = self._was_connected = True

    def _pack(self, items: list[_Item]) -> pb.HoldEdgeSessionRequest:
        queries: list[_Query] = []
        ready: list[pb.HoldEdgeSessionRequest] = []
        for item in items:
            if isinstance(item, pb.HoldEdgeSessionRequest):
                ready.append(item)
            elif self._questions.waits(item.number):
                queries.append(item)
        if ready:
            # One body a message: what else was taken goes back into the box.
            rest: list[_Item] = [*ready[1:], *queries]
            for item in rest:
                self._put(item)
            return ready[0]
        self._last_message += 1
        self._messages[self._last_message] = [query.number for query in queries]
        return pb.HoldEdgeSessionRequest(
            resolve=pb.ResolveManagersRequest(
                request_id=self._last_message,
                users=[
                    pb.UserQuery(
                        user=user_to_proto(query.user),
                        min_epoch=query.min_epoch,
                        traceparent=query.traceparent,
                    )
                    for query in queries
                ],
            )
        )

    def _on_message(self, message: pb.HoldEdgeSessionResponse) -> None:
        match message.WhichOneof("body"):
            case "resolved":
                resolved = message.resolved
                numbers = self._messages.get(resolved.request_id, [])
                if not resolved.more:
                    self._messages.pop(resolved.request_id, None)
                indexes = resolved.indexes or range(len(numbers))
                for index, result in zip(indexes, resolved.results, strict=False):
                    if index >= len(numbers):
                        break  # Not of this stream; the question waits for its deadline.
                    number = numbers[index]
                    if result.WhichOneof("result") == "placement":
                        self._questions.answer(number, placement_of(result.placement))
                    else:
                        self._questions.answer(number, error_of_refusal(result.refusal))
            case "node_fenced":
                fenced = message.node_fenced
                incarnation = NodeIncarnation(NodeId(fenced.node_id), NodeRev(fenced.node_rev))
                self._listener.node_fenced(incarnation, fenced.cause)
            case "moved":
                self._listener.placement_moved(placement_of(message.moved.placement))
            case "nodes":
                self._listener.cluster_nodes(nodes_of(message.nodes))
            case "evicted":
                self._listener.user_evicted(user_of(message.evicted.user), message.evicted.cause)
            case "ask_connections":
                asked = message.ask_connections
                open_, of_users = self._listener.count_connections(
                    [user_of(user) for user in asked.users]
                )
                report = pb.ReportConnections(
                    question=asked.question, open=open_, of_users=of_users
                )
                self._put(pb.HoldEdgeSessionRequest(connections=report))
            case _:
                pass
