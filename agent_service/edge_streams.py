"""What a node has with each edge, whatever carries it: hello, commands in, answers and events out.

One `EdgeStream` per (edge, node) pair carries all users. What waits travels together in
one `NodeBatch`; an edge that does not read fills its box, by number or by bytes, and then its
stream is ended, never the memory of the node: it opens another, attaches, and catches up
from the log. A node that is over ends its streams at once, without what waits in them.

Two carriers move the messages: `agent_service.framed` and, for whoever asks for it, the gRPC
stream in `agent_service.server`. Neither knows what is in them.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

from agent_service import convert
from agent_service.batches import Batch, Item, Packed, Probe, batches_of
from agent_service.core.effects import Deliver
from agent_service.host.edges import EdgeCommand
from agent_service.host.ports import EdgeAnswer, EdgePort
from steward.errors import Reason, StewardError
from steward.model.deliveries import encode_texts, user_check
from steward.model.keys import EdgeId, Epoch, NodeIncarnation, UserKey
from steward.rpc.outbox import Outbox, OutboxClosed, OutboxFull
from steward.runtime.clock import wall_us
from steward.telemetry.catalog import AgentMetrics
from steward.telemetry.logs import fields
from steward.v1 import agent_service_pb2 as pb

_log = logging.getLogger(__name__)

MOST_PER_BATCH = 512
MOST_UNSENT_BYTES = 64 * 1024 * 1024
HELLO_S = 3.0


class EdgeHost(Protocol):
    """What streams need of the host of the managers."""

    def edge_opened(self, edge: EdgePort) -> None: ...

    def edge_closed(self, edge_id: EdgeId) -> None: ...

    def command(self, user: UserKey, epoch: Epoch, command: EdgeCommand, trace: str) -> None: ...

    def is_silent(self) -> bool:
        """Whether nothing may go out any more."""
        ...


class EdgeStream:
    """One edge's stream, as the host sees it (`EdgePort`) and as a carrier does."""

    def __init__(self, edge_id: EdgeId) -> None:
        self.edge_id = edge_id
        self.outbox: Outbox[Item] = Outbox()
        self.aborted = False
        """The node is over: nothing of what waits may go out."""
        self.overflowed = False
        """The edge does not read: nobody waits for it to take what is left."""
        # What the edge calls the users that it is attached to.
        self._channels: dict[UserKey, int] = {}
        self._unsent_bytes = 0
        # When the oldest delivery came that may not be out yet; for metrics alone.
        self._oldest_us = 0

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
        if not self._oldest_us:
            self._oldest_us = wall_us()
        channel = self._channels.get(user)
        if events.traces:
            for trace in convert.traces_to_proto(user, channel, events.traces):
                self._put(trace)
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

    def messages(self, items: Sequence[Item]) -> Iterator[Batch]:
        """What was taken from the box, as messages to send."""
        oldest_us = self._oldest_us
        if len(self.outbox):
            self._unsent_bytes -= sum(item.ByteSize() for item in items)
        else:
            self._unsent_bytes = self._oldest_us = 0
        return _dated(batches_of(items), oldest_us)

    def _put(self, item: Item) -> None:
        size = item.ByteSize()
        try:
            if self._unsent_bytes and self._unsent_bytes + size > MOST_UNSENT_BYTES:
                raise OutboxFull
            self.outbox.put(item)
            self._unsent_bytes += size
        except OutboxFull:
            if not self.outbox.closed:
                told = fields(edge=self.edge_id)
                _log.warning("an edge does not read; its stream is ended", extra=told)
                self.overflowed = True
                self.outbox.close()
        except OutboxClosed:
            pass  # The stream is ending; the edge attaches again on the next one.


class EdgeStreams:
    """The streams of all edges to one node."""

    def __init__(self, host: EdgeHost, cluster: str, metrics: AgentMetrics | None = None) -> None:
        self._host = host
        self._metrics = metrics
        self._cluster = cluster
        self._numbers = itertools.count(1)
        self._open: set[EdgeStream] = set()
        self.incarnation: NodeIncarnation | None = None
        """Who this node is, once it has joined the registry."""
        if metrics is not None:
            metrics.edges.set_function(lambda: len(self._open))
            metrics.outbox.set_function(lambda: sum(len(one.outbox) for one in self._open))

    def open(self, first: pb.HoldEdgeStreamRequest) -> tuple[EdgeStream, pb.NodeStreamWelcome]:
        """Take the first message of an edge; its stream, and what it is told. Raises StewardError.

        Every stream that was opened has to be closed.
        """
        self.refuse_if_over()
        hello = first.hello
        if not first.HasField("hello") or not hello.edge_id:
            raise no_hello()
        if hello.cluster != self._cluster:
            message = f"this node is of cluster {self._cluster!r}"
            raise StewardError(Reason.PERMISSION_DENIED, message)
        if self.incarnation is None:
            message = "this node has not joined the registry yet"
            raise StewardError(Reason.NODE_DRAINING, message)
        node_id, node_rev = self.incarnation
        if hello.node_rev and hello.node_rev != node_rev:
            message = f"this is incarnation {node_rev}; resolve again"
            raise StewardError(Reason.EPOCH_STALE, message)
        # A number of its own for each stream: a late end of an old one detaches only its own.
        stream = EdgeStream(EdgeId(f"{hello.edge_id}#{next(self._numbers)}"))
        self._open.add(stream)
        self._host.edge_opened(stream)
        return stream, pb.NodeStreamWelcome(node_id=node_id, node_rev=node_rev)

    def close(self, stream: EdgeStream) -> None:
        """The edge is gone."""
        stream.outbox.close()
        if stream.overflowed and stream in self._open and self._metrics is not None:
            self._metrics.slow_edges.inc()
        self._open.discard(stream)
        self._host.edge_closed(stream.edge_id)

    def end(self) -> None:
        """End every stream after what waits was sent. Safe to call twice."""
        for stream in list(self._open):
            stream.outbox.close()

    def take(self, stream: EdgeStream, request: pb.HoldEdgeStreamRequest) -> None:
        """What an edge says after its hello."""
        if request.HasField("probe"):
            stream.probed(request.probe.number)
            return
        for proto in request.commands.commands:
            command = convert.command_from_proto(stream.edge_id, proto)
            if command is not None:
                user = convert.user_from_proto(proto.user)
                stream.heard(user, proto)
                self._host.command(user, Epoch(proto.epoch), command, proto.traceparent)

    def is_mute(self, stream: EdgeStream) -> bool:
        """Whether nothing may go out on it, also of what was taken already.

        As it is of a process that stood still in between.
        """
        return self._host.is_silent() or stream.aborted

    def refuse_if_over(self) -> None:
        """Raises StewardError when this node is."""
        if self._host.is_silent():
            raise StewardError(Reason.NODE_DRAINING, "this node is over; ask another one")


def no_hello() -> StewardError:
    """What an edge is told whose first message is another one, or does not come."""
    return StewardError(Reason.PROTOCOL_VIOLATION, "hello must come first")


def _dated(batches: Iterator[Batch], oldest_us: int) -> Iterator[Batch]:
    """With the time since which the oldest of what they deliver is durable."""
    for batch in batches:
        if batch.frames or batch.message.deliveries:
            batch.message.oldest_append_us = oldest_us
        yield batch
