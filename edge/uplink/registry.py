"""The edge's session with the registry over gRPC (`HoldEdgeSession`).

Resolves wait in one outbox and travel together, at most 512 users in a message. When the
stream breaks, those without an answer are asked again on the next one: a resolve is safe
to repeat. Each ends within `RESOLVE_S`, with a placement or a StewardError.

The address may name several registries, of which one serves. Each stream has a connection of its
own, and one on which nothing came for `QUIET_S` while something was asked is given up: a registry
that stands still keeps its connections, and another may serve by now.
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
from steward.rpc.census import HoldingsAnswers
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.outbox import Outbox, OutboxClosed, OutboxFull
from steward.rpc.roles import RoleCredentials
from steward.rpc.stream import PeerStream, keep
from steward.telemetry.logs import fields
from steward.v1 import registry_service_pb2 as pb
from steward.v1 import registry_service_pb2_grpc as rpc

RESOLVE_S = 3.0
QUIET_S = 2.5
"""More than a registry may think about a resolve (`resolve_wait_ms`, 2 s)."""
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
_Stream = PeerStream[_Item, pb.HoldEdgeSessionRequest, pb.HoldEdgeSessionResponse]


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
        self._address = address
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
        self._hello = pb.HoldEdgeSessionRequest(
            hello=pb.EdgeHello(cluster=cluster, edge_id=edge_id, version=version)
        )
        self._stream: _Stream | None = None
        # Counts what came; the timer looks whether anything did, while questions wait.
        self._heard = 0
        self._listening: asyncio.TimerHandle | None = None
        self._task = asyncio.create_task(
            keep(self._attempt, lambda: self._was_connected, self._on_down)
        )
        self._census = HoldingsAnswers(
            listener.attachments,
            lambda report: self._put(pb.HoldEdgeSessionRequest(holdings=report)),
        )
        self._answering = asyncio.create_task(self._census.run())

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
        if self._listening is None:
            self._listen()
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
        self._answering.cancel()
        await asyncio.wait({self._task, self._answering})
        self._questions.close()
        if self._listening is not None:
            self._listening.cancel()

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
        async with make_channel(self._address) as channel:
            stub = rpc.RegistryServiceStub(channel)
            self._stream = PeerStream(
                open_call=lambda: stub.HoldEdgeSession(metadata=call_metadata(self._credentials)),
                hello=self._hello,
                pack=self._pack,
                most=MOST_USERS,
                on_welcome=self._on_welcome,
                on_message=self._on_message,
            )
            try:
                await self._stream.hold(self._outbox)
            finally:
                self._stream = None
                self._connected = False
                self._messages.clear()

    def _listen(self) -> None:
        """Look after a while whether anything came. One timer, and none while nothing is asked."""
        self._listening = asyncio.get_running_loop().call_later(
            QUIET_S, self._listened, self._stream, self._heard
        )

    def _listened(self, stream: _Stream | None, heard: int) -> None:
        self._listening = None
        if not self._asked:
            return
        if stream is not None and stream is self._stream and heard == self._heard:
            stream.give_up("the registry is silent")
        self._listen()

    def _on_down(self, error: StewardError) -> None:
        if self._was_connected or error.reason is Reason.PERMISSION_DENIED:
            _log.warning("registry session over", extra=fields(why=str(error)))

    def _on_welcome(self, message: pb.HoldEdgeSessionResponse) -> None:
        self._connected = self._was_connected = True
        self._heard += 1

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
        self._heard += 1
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
            case "ask_holdings":
                self._census.asked(message.ask_holdings)
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
