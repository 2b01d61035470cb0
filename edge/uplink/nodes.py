"""Streams to agent nodes over gRPC: one `HoldEdgeStream` per incarnation, for all users.

A stream is opened by the first command for its incarnation and lives until it breaks or
the node ends it; then `node_lost` is said once, and commands that were not answered are
the attachments' affair. Stored events and threads are read by unary calls with a
deadline, from the user's own node first and from any other live one after that.
"""

import asyncio
import logging

import grpc

from edge.convert import answer_of, command_to_proto, deliveries_of, user_to_proto
from edge.core.commands import EdgeCommand
from edge.uplink.port import EventPage, EventRange, NodeListener, ThreadPage, ThreadSummary
from steward.errors import Reason, StewardError
from steward.model.keys import NodeIncarnation, StreamId, UserKey
from steward.model.placement import Placement
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.outbox import Outbox, OutboxClosed, OutboxFull
from steward.rpc.roles import RoleCredentials
from steward.rpc.status import error_of
from steward.rpc.stream import PeerStream
from steward.v1 import agent_service_pb2 as pb
from steward.v1 import agent_service_pb2_grpc as rpc

READ_S = 5.0
MOST_COMMANDS = 512
MOST_READ_BYTES = 256 * 1024

_log = logging.getLogger(__name__)


class _Link:
    """The stream to one incarnation, and the channel that reads use too."""

    def __init__(self, placement: Placement, owner: "GrpcNodes") -> None:
        self.incarnation = placement.incarnation
        self.channel = make_channel(placement.address)
        self.stub = rpc.AgentServiceStub(self.channel)
        self.outbox: Outbox[EdgeCommand] = Outbox()
        self.reached = False
        self._owner = owner
        self.task: asyncio.Task[None] = asyncio.create_task(self._run())

    async def _run(self) -> None:
        owner = self._owner
        stream: PeerStream[EdgeCommand, pb.HoldEdgeStreamRequest, pb.HoldEdgeStreamResponse]
        stream = PeerStream(
            open_call=lambda: self.stub.HoldEdgeStream(metadata=owner.metadata()),
            hello=owner.hello(self.incarnation),
            pack=lambda items: pb.HoldEdgeStreamRequest(
                commands=pb.CommandBatch(commands=map(command_to_proto, items))
            ),
            most=MOST_COMMANDS,
            on_welcome=self._on_welcome,
            on_message=self._on_message,
        )
        why = "the node ended the stream"
        try:
            await stream.hold(self.outbox)
        except StewardError as error:
            why = str(error)
        except Exception:
            _log.exception("the stream to %s ended by an error of this process", self.incarnation)
            why = "an error of this process"
        finally:
            owner.ended(self, why)
            await self.channel.close()

    def _on_welcome(self, message: pb.HoldEdgeStreamResponse) -> None:
        welcome = message.welcome
        if (welcome.node_id, welcome.node_rev) != self.incarnation:
            raise StewardError(Reason.EPOCH_STALE, "another incarnation answers at this address")
        self.reached = True

    def _on_message(self, message: pb.HoldEdgeStreamResponse) -> None:
        batch = message.batch
        listener = self._owner.listener
        if batch.answers:
            listener.answered([answer_of(answer) for answer in batch.answers])
        if batch.deliveries:
            listener.delivered(deliveries_of(batch.deliveries))


class GrpcNodes:
    """`edge.uplink.port.Nodes` over gRPC."""

    def __init__(
        self,
        credentials: RoleCredentials,
        cluster: str,
        edge_id: str,
        version: str,
        listener: NodeListener,
    ) -> None:
        self.listener = listener
        self._credentials = credentials
        self._cluster = cluster
        self._edge_id = edge_id
        self._version = version
        self._links: dict[NodeIncarnation, _Link] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def send(self, placement: Placement, command: EdgeCommand) -> None:
        """See the port."""
        link = self._link(placement)
        try:
            link.outbox.put(command)
        except OutboxFull:
            _log.warning("node %s does not read; its stream is closed", placement.node_id)
            link.outbox.close()
        except OutboxClosed:
            pass  # It is ending; `node_lost` follows.

    async def read_events(
        self, user: UserKey, wanted: EventRange, near: Placement | None
    ) -> EventPage:
        """See the port."""
        request = pb.ReadEventsRequest(
            user=user_to_proto(user),
            after=wanted.after,
            until=wanted.until,
            limit=wanted.limit,
            max_bytes=MOST_READ_BYTES,
            thread_id=wanted.thread_id,
            newest=wanted.newest,
        )
        error = _nobody()
        for link in self._candidates(near):
            try:
                answer = await link.stub.ReadEvents(
                    request, timeout=READ_S, metadata=self.metadata()
                )
            except grpc.RpcError as failure:
                error = error_of(failure)
                if not error.row.retry:
                    break
                continue
            return EventPage(
                StreamId(answer.stream_id),
                list(answer.events),
                list(answer.sequences),
                answer.head,
                max(answer.oldest_sequence, 1),
                answer.more,
            )
        raise error

    async def list_threads(
        self, user: UserKey, limit: int, page: str, near: Placement | None
    ) -> ThreadPage:
        """See the port."""
        request = pb.ListThreadsRequest(user=user_to_proto(user), limit=limit, page=page)
        error = _nobody()
        for link in self._candidates(near):
            try:
                answer = await link.stub.ListThreads(
                    request, timeout=READ_S, metadata=self.metadata()
                )
            except grpc.RpcError as failure:
                error = error_of(failure)
                if not error.row.retry:
                    break
                continue
            threads = [
                ThreadSummary(t.thread_id, t.title, t.sequence, t.updated_at)
                for t in answer.threads
            ]
            return ThreadPage(threads, answer.next)
        raise error

    async def close(self) -> None:
        """End all streams. Safe to call twice."""
        tasks = {link.task for link in self._links.values()} | self._ending
        for link in list(self._links.values()):
            link.task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # ---- for the links

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return call_metadata(self._credentials)

    def hello(self, incarnation: NodeIncarnation) -> pb.HoldEdgeStreamRequest:
        return pb.HoldEdgeStreamRequest(
            hello=pb.EdgeStreamHello(
                cluster=self._cluster,
                edge_id=self._edge_id,
                node_rev=incarnation.node_rev,
                version=self._version,
            )
        )

    def ended(self, link: _Link, why: str) -> None:
        """A stream is over: forget it, and say so."""
        if self._links.get(link.incarnation) is link:
            del self._links[link.incarnation]
        self._ending.add(link.task)
        link.task.add_done_callback(self._ending.discard)
        self.listener.node_lost(link.incarnation, why, reached=link.reached)

    def _link(self, placement: Placement) -> _Link:
        link = self._links.get(placement.incarnation)
        if link is None:
            link = self._links[placement.incarnation] = _Link(placement, self)
        return link

    def _candidates(self, near: Placement | None) -> list[_Link]:
        first = [] if near is None else [self._link(near)]
        return first + [link for link in self._links.values() if link.reached and link not in first]


def _nobody() -> StewardError:
    return StewardError(
        Reason.MANAGER_UNAVAILABLE, "no agent node can be reached right now", retry_after_ms=1000
    )
