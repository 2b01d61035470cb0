"""One stream to one incarnation of an agent node, for all users: commands out, events in.

A `NodeLink` opens at once and lives until it breaks, is dropped, or the node ends it; then it
says `ended`, once. Commands that were not answered are the attachments' affair. Probes go in
their place among the commands, each as a message of its own.
"""

import asyncio
import logging
from typing import Protocol

from edge.convert import answer_of, command_to_proto, deliveries_of
from edge.core.commands import EdgeCommand
from edge.core.reach import SendProbe
from edge.uplink.port import NodeListener
from steward.errors import Reason, StewardError
from steward.model.keys import NodeIncarnation
from steward.rpc.factory import make_channel
from steward.rpc.outbox import Outbox, OutboxClosed, OutboxFull
from steward.rpc.stream import PeerStream
from steward.v1 import agent_service_pb2 as pb
from steward.v1 import agent_service_pb2_grpc as rpc

MOST_COMMANDS = 512

_log = logging.getLogger(__name__)

Item = EdgeCommand | SendProbe


class LinkOwner(Protocol):
    """What a link needs of those who hold it."""

    listener: NodeListener

    def metadata(self) -> tuple[tuple[str, str], ...]: ...

    def hello(self, incarnation: NodeIncarnation) -> pb.HoldEdgeStreamRequest: ...

    def opened(self, link: "NodeLink") -> None:
        """The node said welcome."""
        ...

    def heard(self, link: "NodeLink") -> None:
        """Something came in."""
        ...

    def echoed(self, link: "NodeLink", number: int) -> None:
        """A probe came back, behind the events that were before it."""
        ...

    def ended(self, link: "NodeLink", why: str) -> None:
        """The stream is over. Said once."""
        ...


class _Box(Outbox[Item]):
    """Gives probes alone, in their place: a message carries commands or one probe."""

    async def take(self, most: int) -> list[Item]:
        items = await super().take(most)
        for index, item in enumerate(items):
            if isinstance(item, SendProbe):
                end = max(index, 1)
                self._items.extendleft(reversed(items[end:]))
                return items[:end]
        return items


class NodeLink:
    """The stream, and the channel that reads use too. `reached`: it had its welcome."""

    def __init__(self, incarnation: NodeIncarnation, address: str, owner: LinkOwner) -> None:
        self.incarnation = incarnation
        self.reached = False
        # True: nothing that still comes is to be passed on, nor the end of it.
        self.dropped = False
        self._closing = False
        self._channel = make_channel(address)
        self.stub = rpc.AgentServiceStub(self._channel)
        self._outbox = _Box()
        self._owner = owner
        self.task: asyncio.Task[None] = asyncio.create_task(self._run())

    def send(self, item: Item) -> None:
        """Send in order; lost when the stream ends, which `ended` tells."""
        try:
            self._outbox.put(item)
        except OutboxFull:
            _log.warning("node %s does not read; its stream is closed", self.incarnation.node_id)
            self._outbox.close()
        except OutboxClosed:
            pass

    def close(self) -> None:
        """End the stream without waiting for the node. Safe to call twice."""
        if not self._closing:
            self._closing = True
            self.task.cancel()

    async def _run(self) -> None:
        owner = self._owner
        stream: PeerStream[Item, pb.HoldEdgeStreamRequest, pb.HoldEdgeStreamResponse]
        stream = PeerStream(
            open_call=lambda: self.stub.HoldEdgeStream(metadata=owner.metadata()),
            hello=owner.hello(self.incarnation),
            pack=_pack,
            most=MOST_COMMANDS,
            on_welcome=self._on_welcome,
            on_message=self._on_message,
        )
        why = "the stream was closed here"
        try:
            await stream.hold(self._outbox)
            why = "the node ended the stream"
        except StewardError as error:
            why = str(error)
        except Exception:
            _log.exception("the stream to %s ended by an error of this process", self.incarnation)
            why = "an error of this process"
        finally:
            self._outbox.close()
            owner.ended(self, why)
            await self._channel.close()

    def _on_welcome(self, message: pb.HoldEdgeStreamResponse) -> None:
        welcome = message.welcome
        if (welcome.node_id, welcome.node_rev) != self.incarnation:
            raise StewardError(Reason.EPOCH_STALE, "another incarnation answers at this address")
        self.reached = True
        if not self.dropped:
            self._owner.opened(self)

    def _on_message(self, message: pb.HoldEdgeStreamResponse) -> None:
        if self.dropped:
            return
        batch = message.batch
        owner = self._owner
        owner.heard(self)
        if batch.answers:
            owner.listener.answered([answer_of(answer) for answer in batch.answers])
        if batch.deliveries:
            owner.listener.delivered(self.incarnation, deliveries_of(batch.deliveries))
        if heads := batch.heads:
            owner.listener.delivered_packed(self.incarnation, heads, batch.frames)
        for number in batch.probes:
            owner.echoed(self, number)


def _pack(items: list[Item]) -> pb.HoldEdgeStreamRequest:
    first = items[0]
    if isinstance(first, SendProbe):
        return pb.HoldEdgeStreamRequest(probe=pb.StreamProbe(number=first.number))
    commands = [command_to_proto(item) for item in items if isinstance(item, EdgeCommand)]
    return pb.HoldEdgeStreamRequest(commands=pb.CommandBatch(commands=commands))
