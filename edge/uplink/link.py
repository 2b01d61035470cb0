"""One stream to one incarnation of an agent node, for all users: commands out, events in.

A `NodeLink` opens at once and lives until it breaks, is dropped, or the node ends it; then it
says `ended`, once. Commands that were not answered are the attachments' affair. Probes go in
their place among the commands, each as a message of its own. The stream is a framed
connection; a node that ends that without a welcome and without a reason is asked for a gRPC
stream (`edge.uplink.carriers`).
"""

import asyncio
import logging
from typing import Protocol

from edge.convert import answer_of, deliveries_of, traces_of
from edge.uplink.carriers import Box, Item, hold_framed, hold_grpc
from edge.uplink.port import NodeListener
from steward.errors import Reason, StewardError
from steward.model.keys import NodeIncarnation
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.frame_link import Unspoken
from steward.rpc.outbox import OutboxClosed, OutboxFull
from steward.rpc.roles import RoleCredentials
from steward.telemetry.logs import BUG, fields
from steward.v1 import agent_service_pb2 as pb
from steward.v1 import agent_service_pb2_grpc as rpc

_log = logging.getLogger(__name__)


class LinkOwner(Protocol):
    """What a link needs of those who hold it."""

    listener: NodeListener

    credentials: RoleCredentials

    def hello(self, incarnation: NodeIncarnation) -> pb.EdgeStreamHello: ...

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


class NodeLink:
    """The stream, and the channel that reads use too. `reached`: it had its welcome."""

    def __init__(self, incarnation: NodeIncarnation, address: str, owner: LinkOwner) -> None:
        self.incarnation = incarnation
        self.reached = False
        # True: nothing that still comes is to be passed on, nor the end of it.
        self.dropped = False
        self._closing = False
        self._address = address
        self._channel = make_channel(address)
        self.stub = rpc.AgentServiceStub(self._channel)
        self._outbox = Box()
        self._owner = owner
        self.task: asyncio.Task[None] = asyncio.create_task(self._run())

    @property
    def waiting(self) -> int:
        """What is not sent yet, because the node does not read."""
        return len(self._outbox)

    def send(self, item: Item) -> None:
        """Send in order; lost when the stream ends, which `ended` tells."""
        try:
            self._outbox.put(item)
        except OutboxFull:
            _log.warning(
                "a node does not read; its stream is closed",
                extra=fields(node=self.incarnation.node_id),
            )
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
        why = "the stream was closed here"
        try:
            await self._hold(owner.hello(self.incarnation), owner.credentials)
            why = "the node ended the stream"
        except StewardError as error:
            why = str(error)
        except Exception:
            _log.exception(
                "the stream to a node ended by an error of this process",
                extra=fields(node=self.incarnation.node_id, do=BUG),
            )
            why = "an error of this process"
        finally:
            self._outbox.close()
            owner.ended(self, why)
            await self._channel.close()

    async def _hold(self, hello: pb.EdgeStreamHello, credentials: RoleCredentials) -> None:
        """Hold the stream to its end. Raises StewardError."""
        ends = (self._outbox, self._on_welcome, self._on_batch)
        try:
            await hold_framed(self._address, hello, credentials.token(), *ends)
        except Unspoken:
            await hold_grpc(self.stub, call_metadata(credentials), hello, *ends)

    def _on_welcome(self, message: pb.HoldEdgeStreamResponse) -> None:
        welcome = message.welcome
        if (welcome.node_id, welcome.node_rev) != self.incarnation:
            raise StewardError(Reason.EPOCH_STALE, "another incarnation answers at this address")
        self.reached = True
        if not self.dropped:
            self._owner.opened(self)

    def _on_batch(self, batch: pb.NodeBatch, frames: bytes | memoryview) -> None:
        if self.dropped:
            return
        owner = self._owner
        owner.heard(self)
        if batch.answers:
            owner.listener.answered([answer_of(answer) for answer in batch.answers])
        if oldest_us := batch.oldest_append_us:
            owner.listener.batch_came(oldest_us)
        if batch.traces:
            owner.listener.announced(traces_of(batch.traces))
        if batch.deliveries:
            owner.listener.delivered(self.incarnation, deliveries_of(batch.deliveries))
        if heads := batch.heads:
            owner.listener.delivered_packed(self.incarnation, heads, frames)
        for number in batch.probes:
            owner.echoed(self, number)
