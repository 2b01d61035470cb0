"""`Hub`: everything that an edge holds open, and the way between peers and sockets.

It owns the audiences (one per user), the wheel and the flusher, admits connections,
listens to registry, auth and nodes, reads pages of the log for replays, and drains. One
event loop runs it all; there are no locks. The way of a delivery is in `delivering`.

What it is told of nodes: of a fenced one its users are looked up anew, those first who wait for
an answer, some at a time; users of a node that lives but can't be reached from here are sent
away, to come back at another edge.
"""

import asyncio
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from edge.core.attachment import Attachment
from edge.core.attachment_values import Answered, Evicted, NodeLost, PlacementMoved
from edge.core.commands import Answer, CommandOutcome, Delivery, TraceAnnounced, UserCommand
from edge.core.resume import Resume, ResumePoint
from edge.core.server_messages import Limits
from edge.core.session import EdgeSession
from edge.core.session_values import (
    End,
    Leave,
    ReadPage,
    SessionStart,
    TokenChecked,
)
from edge.host.audience import Audience
from edge.host.audiences import Audiences
from edge.host.connection import Connection, EventStreamConnection, WebSocketConnection
from edge.host.delivering import Deliveries
from edge.host.flush import Flusher
from edge.host.merging import MergingConnection
from edge.host.replays import Replays
from edge.host.spans import Arrival, EdgeSpans
from edge.host.timing import DeliveryTimes
from edge.host.wheel import TICK_MS, TimerWheel
from edge.uplink.port import (
    Auth,
    EventPage,
    EventRange,
    Nodes,
    Registry,
    ThreadPage,
    Violations,
)
from steward.errors import ERRORS, Reason, StewardError
from steward.model.census import BUCKETS, SUM_MASK, Held
from steward.model.identity import Identity
from steward.model.keys import ConnectionId, Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.model.stamps import rfc3339
from steward.model.violations import Violation, ViolationKind
from steward.runtime.clock import boot_ms, wall_ms
from steward.telemetry import conventions as names
from steward.telemetry.catalog import EdgeMetrics
from steward.telemetry.instruments import exemplar_of
from steward.telemetry.labels import CLOSE_CODES, OTHER_CODE
from steward.telemetry.logs import fields
from steward.telemetry.tracing import Tracing

COMMAND_S = 10.0
REFUSED_RETRY_MS = 2_000
DRAIN_S = 4.0
ABORT_S = 0.25
# Connections that are told to go in one step, and the pause after it.
LEAVE_AT_ONCE = 256
LEAVE_PACE_S = 0.01
# The least that somebody is told to wait: by then nothing listens at a draining edge.
LEAST_AWAY_MS = 300
AWAY_SPREAD_MS = 500
# Users of a lost node that are looked up in one step; the next ones a tick later.
LOOKUPS_AT_ONCE = 1024
SLOW_CONSUMER_CODE = ERRORS[Reason.SLOW_CONSUMER].close_code

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubSettings:
    """The numbers that a hub needs; times in milliseconds, sizes in bytes."""

    limits: Limits
    max_connections: int
    max_write_buffer_bytes: int
    max_connection_age_ms: int
    drain_spread_ms: int


class Hub:
    """The live heart of an edge. The peers are set before `start`."""

    registry: Registry
    auth: Auth
    nodes: Nodes
    violations: Violations

    def __init__(self, settings: HubSettings, metrics: EdgeMetrics, tracing: Tracing) -> None:
        self.settings = settings
        self.spans = EdgeSpans(tracing)
        self.draining = False
        self._loop = asyncio.get_running_loop()
        self._metrics = metrics
        self.wheel = TimerWheel(boot_ms())
        self.times = DeliveryTimes(metrics)
        self._flusher = Flusher(self._loop, metrics.delivery_seconds, self.times)
        self._audiences = Audiences()
        self._channel_numbers = count(1)
        self._deliveries = Deliveries(self, self._audiences, self._flusher, metrics)
        self._connections: set[Connection] = set()
        self._command_ids = count(1)
        self._random = random.Random()
        self._replays: Replays | None = None
        self._empty = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._frames_in = metrics.frames_in
        # Client messages that are not in the metric yet.
        self._received = 0
        self._resumes = {kind: metrics.resumes.labels(resume=kind.value) for kind in Resume}
        self._open = {
            kind: metrics.connections.labels(kind=kind)
            for kind in (WebSocketConnection.KIND, EventStreamConnection.KIND)
        }

    # ---- life

    def start(self) -> None:
        """Begin to turn the wheel."""
        self._replays = Replays(self.nodes)
        self._timer = self._loop.call_later(TICK_MS / 1000, self._turn)

    async def drain(self) -> None:
        """Ask every connection to leave, spread over the window, and see them off."""
        self.draining = True
        deadline = self._loop.time() + DRAIN_S
        connections = list(self._connections)
        self._random.shuffle(connections)
        for begin in range(0, len(connections), LEAVE_AT_ONCE):
            for connection in connections[begin : begin + LEAVE_AT_ONCE]:
                self._send_away(connection, Reason.EDGE_DRAINING, self.settings.drain_spread_ms)
            await asyncio.sleep(LEAVE_PACE_S)
        await self._emptied(deadline - self._loop.time())
        for connection in list(self._connections):
            connection.abort()
        await self._emptied(ABORT_S)

    def _send_away(self, connection: Connection, reason: Reason, spread_ms: int) -> None:
        after_ms = LEAST_AWAY_MS + self._random.randrange(max(spread_ms - LEAST_AWAY_MS, 0) + 1)
        connection.handle(Leave(reason, after_ms))

    async def close(self) -> None:
        """Stop everything that runs. Safe to call twice."""
        self.draining = True
        if self._timer is not None:
            self._timer.cancel()
        if self._replays is not None:
            await self._replays.close()

    async def _emptied(self, within_s: float) -> None:
        if not self._connections:
            return
        self._empty.clear()
        try:
            async with asyncio.timeout(within_s):
                await self._empty.wait()
        except TimeoutError:
            pass

    def _turn(self) -> None:
        self._timer = self._loop.call_later(TICK_MS / 1000, self._turn)
        if self._received:
            self._frames_in.inc(self._received)
            self._received = 0
        self.wheel.advance(boot_ms())

    # ---- connections

    @property
    def connections(self) -> int:
        """How many sockets are open."""
        return len(self._connections)

    def refusal(self, user: UserKey, client_id: str) -> StewardError | None:
        """Why a new connection of this user is not taken now; None when it is."""
        if self.draining:
            return self.stopping()
        if len(self._connections) >= self.settings.max_connections:
            text = "this edge is full; connect again"
            return StewardError(Reason.NO_CAPACITY, text, retry_after_ms=REFUSED_RETRY_MS)
        audience = self._audiences.by_user.get(user)
        most = self.settings.limits.max_connections
        if audience is None:
            return None
        if self._is_cut_off(audience):
            return self._elsewhere()
        if len(audience.connections) < most:
            return None
        if client_id and any(c.client_id == client_id for c in audience.connections):
            return None
        text = f"{most} connections of this user are open; close one"
        return StewardError(Reason.RATE_LIMITED, text, retry_after_ms=REFUSED_RETRY_MS)

    def _is_cut_off(self, audience: Audience) -> bool:
        placement = audience.placement
        return placement is not None and self._is_out_of_reach(placement.incarnation)

    @staticmethod
    def _elsewhere() -> StewardError:
        text = "this edge can't reach the node of this user; go to another one"
        return StewardError(Reason.MANAGER_UNAVAILABLE, text, retry_after_ms=REFUSED_RETRY_MS)

    def stopping(self) -> StewardError:
        """What everybody is told who comes while this edge drains."""
        text = "this edge is stopping; connect again"
        return StewardError(Reason.EDGE_DRAINING, text, retry_after_ms=REFUSED_RETRY_MS)

    def connect(
        self,
        transport: asyncio.Transport,
        identity: Identity,
        point: ResumePoint,
        client_id: str,
        *,
        websocket: bool,
        merge: bool = False,
        received: bytes = b"",
        arrival: Arrival | None = None,
    ) -> Connection:
        """Take a transport over, after its handshake was answered. Never waits.

        `merge`: a WebSocket that asked for merged deltas. `received` are bytes that came behind
        the handshake.
        """
        now_ms = boot_ms()
        settings = self.settings
        age_ms = settings.max_connection_age_ms
        start = SessionStart(
            connection_id=ConnectionId(f"c-{self._random.getrandbits(64):016x}"),
            user=identity.user,
            point=point,
            limits=settings.limits,
            issued_at_ms=identity.issued_at_ms,
            expires_ms=now_ms + identity.expires_at_ms - wall_ms(),
            expires_text=rfc3339(identity.expires_at_ms),
            heard=websocket,
            aged_ms=now_ms + age_ms - self._random.randrange(age_ms // 10 + 1) if age_ms else 0,
            merge=merge,
        )
        audience = self._audience(identity.user)
        session = EdgeSession(now_ms, start)
        connection: Connection
        limit = settings.max_write_buffer_bytes
        if websocket:
            kind = MergingConnection if merge else WebSocketConnection
            connection = kind(
                audience,
                session,
                self._flusher,
                self.wheel,
                limit,
                client_id,
                settings.limits.max_message_bytes,
            )
        else:
            connection = EventStreamConnection(
                audience, session, self._flusher, self.wheel, limit, client_id
            )
        self._connections.add(connection)
        self._open[connection.KIND].inc()
        transport.set_protocol(connection)
        connection.connection_made(transport)
        audience.join(connection, self.spans.joined(connection, arrival or Arrival()))
        if received:
            connection.data_received(received)
        return connection

    def _audience(self, user: UserKey) -> Audience:
        audience = self._audiences.by_user.get(user)
        if audience is None:
            attachment = Attachment(
                boot_ms(),
                user,
                self.settings.limits.messages_per_minute,
                self._command_ids,
                self._random.randrange(1001),
                channel := next(self._channel_numbers),
            )
            audience = Audience(self, user, attachment, channel)
            self._audiences.add(audience)
            self._metrics.users.set(len(self._audiences))
        return audience

    # ---- requests without a connection

    async def command(self, user: UserKey, body: UserCommand, arrival: Arrival) -> CommandOutcome:
        """Send one command and wait for its outcome. Raises StewardError(MANAGER_UNAVAILABLE)."""
        audience = self._audience(user)
        if self._is_cut_off(audience):
            raise self._elsewhere()
        future: asyncio.Future[CommandOutcome] = self._loop.create_future()

        def settle(outcome: CommandOutcome) -> None:
            if not future.done():
                future.set_result(outcome)

        audience.enter(self.spans.asked(arrival))
        try:
            audience.command(arrival, body, settle)
            async with asyncio.timeout(COMMAND_S):
                return await future
        except TimeoutError:
            text = "the manager could not be reached in time; send again with the same id"
            raise StewardError(
                Reason.MANAGER_UNAVAILABLE, text, retry_after_ms=REFUSED_RETRY_MS
            ) from None
        finally:
            audience.exit()

    async def history(self, user: UserKey, wanted: EventRange) -> EventPage:
        """Stored events, from any live node. Raises StewardError."""
        return await self.nodes.read_events(user, wanted, self._near(user))

    async def threads(self, user: UserKey, limit: int, page: str) -> ThreadPage:
        """Threads, newest first, from any live node. Raises StewardError."""
        return await self.nodes.list_threads(user, limit, page, self._near(user))

    def _near(self, user: UserKey) -> Placement | None:
        """Where this user is, if that is known here: reading places nobody."""
        audience = self._audiences.by_user.get(user)
        return audience.placement if audience is not None else None

    # ---- Surroundings

    def read_page(self, audience: Audience, connection: Connection, page: ReadPage) -> None:
        if self._replays is not None:
            self._replays.start(audience, connection, page)

    def check_token(self, connection: Connection, token: str) -> None:
        def checked(future: "asyncio.Future[Identity]") -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                identity = future.result()
                expires_ms = boot_ms() + identity.expires_at_ms - wall_ms()
                text = rfc3339(identity.expires_at_ms)
                connection.handle(TokenChecked(identity, expires_ms, text))
            elif isinstance(error, StewardError):
                connection.handle(TokenChecked(error))

        self.auth.check_token(token).add_done_callback(checked)

    def attached(self, connection: Connection) -> None:
        resume = connection.session.resume
        if resume is not None:
            self._resumes[resume].inc()
            exemplar = exemplar_of(self.spans.trace_of(connection))
            took_s = (boot_ms() - connection.opened_ms) / 1000
            self._metrics.attach_seconds.observe(took_s, exemplar)

    def received(self) -> None:
        self._received += 1

    def refused(self, reason: str) -> None:
        self._metrics.errors.labels(reason=reason).inc()

    def report(
        self,
        kind: ViolationKind,
        evidence: str,
        user: UserKey | None = None,
        epoch: int = 0,
        node: NodeIncarnation | None = None,
    ) -> None:
        """Put a refusal or a breach on record."""
        self.violations.report(Violation(kind, evidence, user, Epoch(epoch), node))

    def leaving(self, connection: Connection, code: int) -> None:
        # A client may close with any code: as a label each would be a series of its own.
        known = str(code)
        self._metrics.closes.labels(code=known if known in CLOSE_CODES else OTHER_CODE).inc()
        if code == SLOW_CONSUMER_CODE:
            self._metrics.slow_consumers.inc()
        self.times.lost(connection)
        self.spans.leaving(connection, code)

    def events_lost(self, number: int) -> None:
        self._metrics.lost_events.inc(number)

    def lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._open[connection.KIND].dec()
        if not self._connections:
            self._empty.set()

    def over(self, audience: Audience) -> None:
        if self._audiences.remove(audience):
            self.times.over(audience)
            self._metrics.users.set(len(self._audiences))

    # ---- what peers say

    def answered(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            audience = self._audiences.by_user.get(answer.user)
            if audience is not None:
                audience.handle(Answered(answer))

    def batch_came(self, oldest_append_us: int) -> None:
        self.times.batch_came(oldest_append_us)

    def announced(self, traces: Sequence[TraceAnnounced]) -> None:
        self._deliveries.announced(traces)

    def delivered(self, source: NodeIncarnation, deliveries: Sequence[Delivery]) -> None:
        self._deliveries.delivered(source, deliveries)

    def delivered_packed(
        self, source: NodeIncarnation, heads: bytes, frames: bytes | memoryview
    ) -> None:
        self._deliveries.delivered_packed(source, heads, frames)

    def cluster_nodes(self, nodes: Mapping[NodeIncarnation, str]) -> None:
        self.nodes.keep(nodes)

    def node_lost(self, incarnation: NodeIncarnation, why: str, *, reached: bool) -> None:
        if self.draining and not self._connections:
            return
        node = fields(node=incarnation.node_id, rev=incarnation.node_rev, why=why)
        _log.info("the stream to a node is over", extra=node)
        if not reached:
            self.registry.report_unreachable(incarnation, why)
        self._look_up(incarnation, fenced=False)

    def node_fenced(self, incarnation: NodeIncarnation, cause: str) -> None:
        node = fields(node=incarnation.node_id, rev=incarnation.node_rev, cause=cause)
        _log.info("a node is fenced", extra=node)
        # Before its users are looked up: what it still says is not to come between.
        self.nodes.drop(incarnation)
        self._look_up(incarnation, fenced=True)

    def node_suspected(self, incarnation: NodeIncarnation, evidence: str) -> None:
        self.registry.report_unreachable(incarnation, evidence)

    def node_given_up(self, incarnation: NodeIncarnation) -> None:
        if not self._is_out_of_reach(incarnation):
            return
        for audience in self._of_node(incarnation):
            for connection in audience.connections:
                self._send_away(connection, Reason.MANAGER_UNAVAILABLE, AWAY_SPREAD_MS)

    def _is_out_of_reach(self, incarnation: NodeIncarnation) -> bool:
        """The node lives, and only this edge can't reach it, as far as anybody can tell.

        Without the registry nobody can: then it may be dead, and no other edge is better.
        """
        return self.registry.connected and self.nodes.is_given_up(incarnation)

    def _of_node(self, incarnation: NodeIncarnation) -> list[Audience]:
        return [
            audience
            for audience in self._audiences.by_user.values()
            if audience.placement is not None and audience.placement.incarnation == incarnation
        ]

    def _look_up(self, incarnation: NodeIncarnation, *, fenced: bool) -> None:
        """All lose their manager now; they ask for the next one some at a time."""
        lost = self._of_node(incarnation)
        lost.sort(key=_urgency)
        for index, audience in enumerate(lost):
            wait_ms = index // LOOKUPS_AT_ONCE * TICK_MS
            audience.search_again(names.FAILOVER if fenced else names.REATTACH)
            audience.handle(NodeLost(incarnation, fenced, wait_ms))

    def placement_moved(self, placement: Placement) -> None:
        audience = self._audiences.by_user.get(placement.user)
        if audience is not None:
            audience.search_again(names.HANDOFF)
            audience.handle(PlacementMoved(placement))

    def user_evicted(self, user: UserKey, cause: str) -> None:
        audience = self._audiences.by_user.get(user)
        if audience is not None:
            _log.info("the sessions of a user were ended", extra=fields(cause=cause))
            audience.handle(Evicted())

    def count_connections(self, users: Sequence[UserKey]) -> tuple[int, list[int]]:
        """Of all users, and of each of these; an operator asks, through the registry."""
        audiences = [self._audiences.by_user.get(user) for user in users]
        return len(self._connections), [len(a.connections) if a else 0 for a in audiences]

    def attachments(self) -> Iterator[Held]:
        """See the port. The hash is of this process alone: the registry compares it with itself."""
        for audience in list(self._audiences.by_user.values()):
            attachment = audience.attachment
            epoch, node = attachment.live_epoch, attachment.live_node
            if epoch and node is not None:
                user = audience.user
                weight = hash((user, epoch, node)) & SUM_MASK
                yield Held(audience.check % BUCKETS, weight, user, Epoch(epoch), node)

    def user_revoked(self, user: UserKey, issued_before_ms: int) -> None:
        audience = self._audiences.by_user.get(user)
        for connection in audience.connections if audience is not None else ():
            if connection.session.issued_at_ms < issued_before_ms:
                connection.handle(End(Reason.TOKEN_REVOKED))


def _urgency(audience: Audience) -> int:
    """Who waits for an answer goes first, then who watches."""
    if audience.attachment.waiting:
        return 0
    return 1 if audience.connections else 2
