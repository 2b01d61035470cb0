"""Streams to agent nodes: one per incarnation, warm to every node that lives.

A stream is opened as soon as the registry names the node (a few at a time), or by the
first command for it, and opened again with a backoff for as long as the node is named. A
probe on each tells whether it carries anything (`edge.core.reach`). A node that is no
longer named loses its stream after `UNLISTED_MS`: the registry itself may have just begun
anew. A dropped one loses it at once. Stored events and threads are read by unary gRPC calls with
a deadline, from the user's own node first, unless it is silent, and from any other after it.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from itertools import count
from typing import Any

import grpc

from edge.convert import user_to_proto
from edge.core.commands import EdgeCommand
from edge.core.reach import PROBE_MS, CloseStream, Effect, GiveUp, Reach, SendProbe, Suspect
from edge.uplink.link import NodeLink
from edge.uplink.port import EventPage, EventRange, NodeListener, ThreadPage, ThreadSummary
from steward.errors import Reason, StewardError
from steward.model.keys import NodeIncarnation, StreamId, UserKey
from steward.model.placement import Placement
from steward.rpc.factory import call_metadata
from steward.rpc.roles import RoleCredentials
from steward.rpc.status import error_of
from steward.rpc.stream import FIRST_BACKOFF_S, MOST_BACKOFF_S
from steward.runtime.clock import boot_ms
from steward.v1 import agent_service_pb2 as pb

READ_S = 5.0
MOST_READ_BYTES = 256 * 1024
OPEN_AT_ONCE = 8
OPEN_PACE_S = 0.02
UNLISTED_MS = 5_000


class _Peer:
    """One incarnation: how it is reached, and the stream to it while there is one."""

    def __init__(self, incarnation: NodeIncarnation, address: str) -> None:
        self.incarnation = incarnation
        self.address = address
        self.reach = Reach(boot_ms())
        self.link: NodeLink | None = None
        self.backoff_s = FIRST_BACKOFF_S
        self.timer: asyncio.TimerHandle | None = None
        # Since when the registry does not name it; 0 while it does.
        self.unlisted_ms = boot_ms()


class WireNodes:
    """`edge.uplink.port.Nodes` over the network, and the `LinkOwner` of its streams."""

    def __init__(
        self,
        credentials: RoleCredentials,
        cluster: str,
        edge_id: str,
        version: str,
        listener: NodeListener,
    ) -> None:
        self.listener = listener
        self.credentials = credentials
        self._cluster = cluster
        self._edge_id = edge_id
        self._version = version
        self._loop = asyncio.get_running_loop()
        self._peers: dict[NodeIncarnation, _Peer] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._numbers = count(1)
        self._random = random.Random()
        self._closed = False
        self._timer = self._loop.call_later(PROBE_MS / 1000, self._turn)

    @property
    def listed(self) -> int:
        return sum(not peer.unlisted_ms for peer in self._peers.values())

    @property
    def proven(self) -> int:
        return sum(peer.reach.proven for peer in self._peers.values())

    @property
    def waiting(self) -> int:
        """Commands that are not sent yet, to all nodes."""
        return sum(peer.link.waiting for peer in self._peers.values() if peer.link is not None)

    def is_given_up(self, incarnation: NodeIncarnation) -> bool:
        """See the port."""
        peer = self._peers.get(incarnation)
        return peer is not None and not peer.unlisted_ms and peer.reach.given_up

    def keep(self, nodes: Mapping[NodeIncarnation, str]) -> None:
        """See the port."""
        now_ms = boot_ms()
        opened = 0
        for incarnation, address in nodes.items():
            peer = self._peers.get(incarnation)
            if peer is None:
                peer = self._peers[incarnation] = _Peer(incarnation, address)
            peer.unlisted_ms = 0
            if peer.link is None and peer.timer is None:
                self._open_later(peer, opened // OPEN_AT_ONCE * OPEN_PACE_S)
                opened += 1
        for peer in self._peers.values():
            if peer.incarnation not in nodes and not peer.unlisted_ms:
                peer.unlisted_ms = now_ms

    def drop(self, incarnation: NodeIncarnation) -> None:
        """See the port."""
        peer = self._peers.pop(incarnation, None)
        if peer is not None:
            self._shut(peer)

    def send(self, placement: Placement, command: EdgeCommand) -> None:
        """See the port."""
        self._link(placement).send(command)

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
                answer = await self._ask(link.stub.ReadEvents, request)
            except StewardError as failure:
                error = failure
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
                answer = await self._ask(link.stub.ListThreads, request)
            except StewardError as failure:
                error = failure
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
        self._closed = True
        self._timer.cancel()
        for incarnation in list(self._peers):
            self.drop(incarnation)
        if self._ending:
            await asyncio.wait(set(self._ending))

    # ---- for the links

    def hello(self, incarnation: NodeIncarnation) -> pb.EdgeStreamHello:
        return pb.EdgeStreamHello(
            cluster=self._cluster,
            edge_id=self._edge_id,
            node_rev=incarnation.node_rev,
            version=self._version,
        )

    def opened(self, link: NodeLink) -> None:
        peer = self._peers.get(link.incarnation)
        if peer is not None and peer.link is link:
            self._do(peer, peer.reach.opened(next(self._numbers)))

    def heard(self, link: NodeLink) -> None:
        peer = self._peers.get(link.incarnation)
        if peer is not None and peer.link is link:
            peer.reach.heard()

    def echoed(self, link: NodeLink, number: int) -> None:
        peer = self._peers.get(link.incarnation)
        if peer is not None and peer.link is link:
            peer.reach.echoed(number)
            peer.backoff_s = FIRST_BACKOFF_S

    def ended(self, link: NodeLink, why: str) -> None:
        self._ending.add(link.task)
        link.task.add_done_callback(self._ending.discard)
        peer = self._peers.get(link.incarnation)
        if peer is None or peer.link is not link:
            return
        peer.link = None
        peer.reach.closed()
        if peer.unlisted_ms:
            del self._peers[link.incarnation]
        else:
            self._open_later(peer, peer.backoff_s * self._random.uniform(0.5, 1.0))
            peer.backoff_s = min(peer.backoff_s * 2, MOST_BACKOFF_S)
        self.listener.node_lost(link.incarnation, why, reached=link.reached)

    # ---- streams

    def _link(self, placement: Placement) -> NodeLink:
        """The stream to a user's node, also to one that the registry has not named yet."""
        peer = self._peers.get(placement.incarnation)
        if peer is None:
            peer = _Peer(placement.incarnation, placement.address)
            self._peers[placement.incarnation] = peer
        return self._open(peer)

    def _open_later(self, peer: _Peer, delay_s: float) -> None:
        peer.timer = self._loop.call_later(delay_s, self._open, peer)

    def _open(self, peer: _Peer) -> NodeLink:
        if peer.timer is not None:
            peer.timer.cancel()
            peer.timer = None
        if peer.link is None:
            peer.link = NodeLink(peer.incarnation, peer.address, self)
        return peer.link

    def _shut(self, peer: _Peer) -> None:
        """End what there is of it, without a word."""
        if peer.timer is not None:
            peer.timer.cancel()
        link, peer.link = peer.link, None
        if link is not None:
            link.dropped = True
            self._ending.add(link.task)
            link.task.add_done_callback(self._ending.discard)
            link.close()

    def _turn(self) -> None:
        """One step of time for every node."""
        self._timer = self._loop.call_later(PROBE_MS / 1000, self._turn)
        now_ms = boot_ms()
        for peer in list(self._peers.values()):
            if peer.unlisted_ms and now_ms - peer.unlisted_ms >= UNLISTED_MS:
                if peer.link is None:
                    self.drop(peer.incarnation)
                else:
                    peer.link.close()  # Its users are told by `ended`.
                continue
            self._do(peer, peer.reach.tick(now_ms, next(self._numbers)))

    def _do(self, peer: _Peer, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendProbe():
                    if peer.link is not None:
                        peer.link.send(effect)
                case Suspect(evidence):
                    self.listener.node_suspected(peer.incarnation, evidence)
                case CloseStream():
                    if peer.link is not None:
                        peer.link.close()
                case GiveUp():
                    if not peer.unlisted_ms:
                        self.listener.node_given_up(peer.incarnation)

    async def _ask(self, method: Callable[..., Awaitable[Any]], request: object) -> Any:
        """One read. Raises StewardError, also when the node is dropped while it is under way."""
        try:
            return await method(request, timeout=READ_S, metadata=call_metadata(self.credentials))
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        except grpc.aio.UsageError:
            raise _over() from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not this task but the call was cancelled: its channel was closed.
            raise _over() from None

    def _candidates(self, near: Placement | None) -> list[NodeLink]:
        """Whom to ask for stored events: the user's node, if it answers; then who does."""
        links = [] if near is None else [self._link(near)]
        peers = [peer for peer in self._peers.values() if peer.link not in (None, *links)]
        self._random.shuffle(peers)
        links += [peer.link for peer in peers if peer.link is not None and peer.link.reached]
        links.sort(key=lambda link: not self._peers[link.incarnation].reach.proven)
        return links


def _over() -> StewardError:
    return StewardError(Reason.MANAGER_UNAVAILABLE, "the node is over; ask another one")


def _nobody() -> StewardError:
    return StewardError(
        Reason.MANAGER_UNAVAILABLE, "no agent node can be reached right now", retry_after_ms=1000
    )
