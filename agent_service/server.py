"""The node's gRPC server: edge streams in and out, and reads of stored events.

One `EdgeStream` per (edge, node) pair carries all users. What waits travels together in
one `NodeBatch`; an edge that does not read fills its box, and then its stream is ended,
never the memory of the node: it opens another, attaches, and catches up from the log.
A node that is over ends its streams at once, without what waits in them.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc

from agent_service import convert
from agent_service.core.effects import Deliver
from agent_service.host.host import ManagerHost
from agent_service.host.ports import EdgeAnswer
from agent_service.log import convert as log_convert
from agent_service.log.port import EventLog
from steward.errors import Reason, StewardError
from steward.model.deliveries import HEAD, encode_texts, user_check
from steward.model.keys import EdgeId, Epoch, NodeIncarnation, UserKey
from steward.rpc.outbox import Outbox, OutboxClosed, OutboxFull
from steward.rpc.roles import Role
from steward.rpc.status import abort
from steward.telemetry.logs import fields
from steward.v1 import agent_service_pb2 as pb
from steward.v1.agent_service_pb2_grpc import AgentServiceServicer

_log = logging.getLogger(__name__)

SERVICE = "/steward.v1.AgentService/"
ALLOWED: dict[str, frozenset[Role]] = {
    SERVICE + "HoldEdgeStream": frozenset({Role.EDGE}),
    SERVICE + "ReadEvents": frozenset({Role.EDGE, Role.OPERATOR}),
    SERVICE + "ListThreads": frozenset({Role.EDGE}),
}
MOST_PER_BATCH = 512
MOST_BYTES_PER_BATCH = 4 * 1024 * 1024
HELLO_S = 3.0
READ_S = 10.0


@dataclass(frozen=True, slots=True)
class Probe:
    """An edge asks whether this stream carries anything; comes back behind what waits."""

    number: int

    def ByteSize(self) -> int:
        """As of the messages that it travels with."""
        return 10


class Packed(NamedTuple):
    """A delivery on a channel: what goes into its head, and its events as WebSocket frames."""

    channel: int
    epoch: int
    first: int
    events: int
    check: int
    frames: bytes

    def ByteSize(self) -> int:
        """As of the messages that it travels with."""
        return HEAD.size + len(self.frames)


Item = pb.Answer | pb.Delivery | Packed | Probe


class EdgeStream:
    """One edge's stream, as the host sees it (`EdgePort`)."""

    def __init__(self, edge_id: EdgeId) -> None:
        self.edge_id = edge_id
        self.outbox: Outbox[Item] = Outbox()
        self.aborted = False
        # What the edge calls the users that it is attached to.
        self._channels: dict[UserKey, int] = {}

    def heard(self, user: UserKey, proto: pb.EdgeCommand) -> None:
        """A command of the edge came in: an attach may name a channel for the user."""
        body = proto.WhichOneof("body")
        if body == "attach" and proto.attach.channel:
            self._channels[user] = proto.attach.channel
        elif body in ("attach", "detach"):
            self._channels.pop(user, None)

    def answer(self, user: UserKey, epoch: Epoch, answer: EdgeAnswer, known: Epoch) -> None:
        self._put(convert.answer_to_proto(user, epoch, answer, known))

    def deliver(self, user: UserKey, epoch: Epoch, events: Deliver) -> None:
        channel = self._channels.get(user)
        if channel is None:
            self._put(convert.delivery_to_proto(user, epoch, events))
        else:
            frames = encode_texts(events.payloads)
            count = events.last - events.first + 1
            self._put(Packed(channel, epoch, events.first, count, user_check(user), frames))

    def manager_lost(self, user: UserKey, epoch: Epoch, reason: Reason, known: Epoch) -> None:
        lost = pb.ManagerLost(reason=reason.value, known_epoch=known)
        self._put(pb.Answer(user=convert.user_to_proto(user), epoch=epoch, manager_lost=lost))

    def client_taken(self, user: UserKey, epoch: Epoch, client_id: str) -> None:
        taken = pb.ClientTaken(client_id=client_id)
        self._put(pb.Answer(user=convert.user_to_proto(user), epoch=epoch, client_taken=taken))

    def probed(self, number: int) -> None:
        """A probe came in; it takes the way of every answer and delivery."""
        self._put(Probe(number))

    def abort(self) -> None:
        self.aborted = True
        self.outbox.close()

    def _put(self, item: Item) -> None:
        try:
            self.outbox.put(item)
        except OutboxFull:
            told = fields(edge=self.edge_id)
            _log.warning("an edge does not read; its stream is ended", extra=told)
            self.outbox.close()
        except OutboxClosed:
            pass  # The stream is ending; the edge attaches again on the next one.


class AgentServicer(AgentServiceServicer):
    """Wire in, wire out; decides nothing."""

    def __init__(self, host: ManagerHost, log: EventLog, cluster: str) -> None:
        self._host = host
        self._log = log
        self._cluster = cluster
        self._numbers = itertools.count(1)
        self._streams: set[EdgeStream] = set()
        self.incarnation: NodeIncarnation | None = None

    async def HoldEdgeStream(
        self,
        request_iterator: AsyncIterator[pb.HoldEdgeStreamRequest],
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> AsyncIterator[pb.HoldEdgeStreamResponse]:
        requests = aiter(request_iterator)
        hello = await self._hello(requests, context)
        # A number of its own for each stream: a late end of an old one detaches only its own.
        stream = EdgeStream(EdgeId(f"{hello.edge_id}#{next(self._numbers)}"))
        self._streams.add(stream)
        self._host.edge_opened(stream)
        reading = asyncio.ensure_future(self._read(requests, stream))
        try:
            assert self.incarnation is not None
            node_id, node_rev = self.incarnation
            yield pb.HoldEdgeStreamResponse(
                welcome=pb.NodeStreamWelcome(node_id=node_id, node_rev=node_rev)
            )
            while items := await stream.outbox.take(MOST_PER_BATCH):
                for batch in batches_of(items):
                    # Also what was taken before this process stood still must not go out.
                    if self._host.is_silent() or stream.aborted:
                        return
                    yield pb.HoldEdgeStreamResponse(batch=batch)
        finally:
            self._streams.discard(stream)
            self._host.edge_closed(stream.edge_id)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def ReadEvents(
        self, request: pb.ReadEventsRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.ReadEventsResponse:
        user = convert.user_from_proto(request.user)
        await self._refuse_if_over(context)
        try:
            wanted = log_convert.range_from(request)
            page = await asyncio.wait_for(self._log.read(user, wanted), READ_S)
        except TimeoutError:
            await abort(context, StewardError(Reason.STORE_UNAVAILABLE, "the log is silent"))
        except StewardError as error:
            await abort(context, error)
        self._host.trimmed(user, page.oldest_sequence)
        return log_convert.page_to(page)

    async def ListThreads(
        self, request: pb.ListThreadsRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.ListThreadsResponse:
        user = convert.user_from_proto(request.user)
        limit = min(request.limit or 100, 1000)
        await self._refuse_if_over(context)
        try:
            reading = self._log.threads(user, limit, request.page)
            threads, next_page = await asyncio.wait_for(reading, READ_S)
        except TimeoutError:
            await abort(context, StewardError(Reason.STORE_UNAVAILABLE, "the log is silent"))
        except StewardError as error:
            await abort(context, error)
        return log_convert.threads_to(threads, next_page)

    def close_streams(self) -> None:
        """End every edge stream after what waits was sent. Safe to call twice."""
        for stream in list(self._streams):
            stream.outbox.close()

    async def _refuse_if_over(self, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        if self._host.is_silent():
            message = "this node is over; ask another one"
            await abort(context, StewardError(Reason.NODE_DRAINING, message))

    async def _hello(
        self,
        requests: AsyncIterator[pb.HoldEdgeStreamRequest],
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> pb.EdgeStreamHello:
        try:
            first = await asyncio.wait_for(anext(requests), HELLO_S)
        except (TimeoutError, StopAsyncIteration):
            await abort(context, StewardError(Reason.PROTOCOL_VIOLATION, "hello must come first"))
        await self._refuse_if_over(context)
        hello = first.hello
        if first.WhichOneof("body") != "hello" or not hello.edge_id:
            await abort(context, StewardError(Reason.PROTOCOL_VIOLATION, "hello must come first"))
        if hello.cluster != self._cluster:
            message = f"this node is of cluster {self._cluster!r}"
            await abort(context, StewardError(Reason.PERMISSION_DENIED, message))
        if self.incarnation is None:
            message = "this node has not joined the registry yet"
            await abort(context, StewardError(Reason.NODE_DRAINING, message))
        if hello.node_rev and hello.node_rev != self.incarnation.node_rev:
            message = f"this is incarnation {self.incarnation.node_rev}; resolve again"
            await abort(context, StewardError(Reason.EPOCH_STALE, message))
        return hello

    async def _read(
        self, requests: AsyncIterator[pb.HoldEdgeStreamRequest], stream: EdgeStream
    ) -> None:
        try:
            async for request in requests:
                if request.WhichOneof("body") == "probe":
                    stream.probed(request.probe.number)
                for proto in request.commands.commands:
                    command = convert.command_from_proto(stream.edge_id, proto)
                    if command is not None:
                        user = convert.user_from_proto(proto.user)
                        stream.heard(user, proto)
                        self._host.command(user, Epoch(proto.epoch), command, proto.traceparent)
        except grpc.RpcError:
            pass  # The edge is gone; the write side ends the same way.
        finally:
            stream.outbox.close()


def batches_of(items: Sequence[Item]) -> Iterator[pb.NodeBatch]:
    """Messages of at most `MOST_BYTES_PER_BATCH`, or of one item; the order per user is kept.

    A probe is never ahead of what was put before it.
    """
    batch, size = pb.NodeBatch(), 0
    packed: list[Packed] = []
    for item in items:
        bytes_more = item.ByteSize()
        if size and size + bytes_more > MOST_BYTES_PER_BATCH:
            yield _with(batch, packed)
            batch, size = pb.NodeBatch(), 0
            packed = []
        if isinstance(item, Packed):
            packed.append(item)
        elif isinstance(item, pb.Answer):
            batch.answers.append(item)
        elif isinstance(item, Probe):
            batch.probes.append(item.number)
        else:
            batch.deliveries.append(item)
        size += bytes_more
    yield _with(batch, packed)


def _with(batch: pb.NodeBatch, packed: list[Packed]) -> pb.NodeBatch:
    """With these deliveries; what follows each other on one channel as one, with one head."""
    if not packed:
        return batch
    heads: list[bytes] = []
    frames: list[bytes] = []
    runs: dict[int, list[Packed]] = {}
    for item in packed:
        run = runs.setdefault(item.channel, [])
        if run and (item.epoch, item.first) != (run[-1].epoch, run[-1].first + run[-1].events):
            _join(run, heads, frames)
            run.clear()
        run.append(item)
    for run in runs.values():
        _join(run, heads, frames)
    batch.heads = b"".join(heads)
    batch.frames = b"".join(frames)
    return batch


def _join(run: list[Packed], heads: list[bytes], frames: list[bytes]) -> None:
    channel, epoch, first, _, check, _ = run[0]
    count = sum(item.events for item in run)
    parts = [item.frames for item in run]
    heads.append(HEAD.pack(channel, epoch, first, count, sum(map(len, parts)), check))
    frames += parts
