"""`Hub`: everything that an edge holds open, and the way between peers and sockets.

It owns the audiences (one per user), the wheel and the flusher, admits connections,
listens to registry, auth and nodes, reads pages of the log for replays, and drains. One
event loop runs it all; there are no locks. On the way of a delivery there is no task, log
line or span per event, unless a trace is sampled.
"""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from edge.core.attachment import Answered, Attachment, NodeLost, PlacementMoved
from edge.core.batch import EventBatch
from edge.core.commands import Answer, CommandOutcome, Delivery, UserCommand
from edge.core.resume import ResumePoint
from edge.core.server_messages import Limits
from edge.core.session import EdgeSession
from edge.core.session_values import (
    End,
    Leave,
    PageRead,
    ReadFailed,
    ReadPage,
    Send,
    SessionStart,
    TokenChecked,
)
from edge.host.audience import Audience
from edge.host.connection import Connection, EventStreamConnection, WebSocketConnection
from edge.host.flush import Flusher
from edge.host.wheel import TICK_MS, TimerWheel
from edge.uplink.port import Auth, EventPage, EventRange, Nodes, Registry, ThreadPage
from steward.errors import ERRORS, Reason, StewardError
from steward.model.identity import Identity
from steward.model.keys import ConnectionId, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.model.stamps import rfc3339
from steward.runtime.clock import boot_ms, wall_ms
from steward.telemetry.catalog import EdgeMetrics
from steward.telemetry.tracing import Tracing, is_sampled

PAGE_EVENTS = 500
READS_AT_ONCE = 64
COMMAND_S = 10.0
REFUSED_RETRY_MS = 2_000
DRAIN_S = 4.0
ABORT_S = 0.25
OWN_CODES = frozenset(row.close_code for row in ERRORS.values())
_TRACE_FIELD = b'"trace":"'

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
    """The live heart of an edge. `registry`, `auth` and `nodes` are set before `start`."""

    registry: Registry
    auth: Auth
    nodes: Nodes

    def __init__(self, settings: HubSettings, metrics: EdgeMetrics, tracing: Tracing) -> None:
        self.settings = settings
        self.tracing = tracing
        self.draining = False
        self._loop = asyncio.get_running_loop()
        self._metrics = metrics
        self.wheel = TimerWheel(boot_ms())
        self._flusher = Flusher(self._loop, metrics.delivery_seconds)
        self._audiences: dict[UserKey, Audience] = {}
        self._connections: set[Connection] = set()
        self._command_ids = count(1)
        self._random = random.Random()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reads = asyncio.Semaphore(READS_AT_ONCE)
        self._empty = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._frames_in = metrics.frames_in
        self._events_out = metrics.events_out
        self._dropped = metrics.dropped
        self._open = {
            kind: metrics.connections.labels(kind=kind)
            for kind in (WebSocketConnection.KIND, EventStreamConnection.KIND)
        }

    # ---- life

    def start(self) -> None:
        """Begin to turn the wheel."""
        self._timer = self._loop.call_later(TICK_MS / 1000, self._turn)

    async def drain(self) -> None:
        """Ask every connection to leave, spread over the window, and see them off."""
        self.draining = True
        spread_ms = self.settings.drain_spread_ms
        for connection in list(self._connections):
            after_ms = self._random.randrange(spread_ms + 1)
            connection.handle(Leave(Reason.EDGE_DRAINING, after_ms))
        await self._emptied(DRAIN_S)
        for connection in list(self._connections):
            connection.abort()
        await self._emptied(ABORT_S)

    async def close(self) -> None:
        """Stop everything that runs. Safe to call twice."""
        self.draining = True
        if self._timer is not None:
            self._timer.cancel()
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

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
        self.wheel.advance(boot_ms())

    # ---- connections

    def refusal(self, user: UserKey, client_id: str) -> StewardError | None:
        """Why a new connection of this user is not taken now; None when it is."""
        if self.draining:
            return self.stopping()
        if len(self._connections) >= self.settings.max_connections:
            text = "this edge is full; connect again"
            return StewardError(Reason.NO_CAPACITY, text, retry_after_ms=REFUSED_RETRY_MS)
        audience = self._audiences.get(user)
        most = self.settings.limits.max_connections
        if audience is None or len(audience.connections) < most:
            return None
        if client_id and any(c.client_id == client_id for c in audience.connections):
            return None
        text = f"{most} connections of this user are open; close one"
        return StewardError(Reason.RATE_LIMITED, text, retry_after_ms=REFUSED_RETRY_MS)

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
        received: bytes = b"",
    ) -> Connection:
        """Take a transport over, after its handshake was answered. Never waits.

        `received` are bytes that came behind the handshake.
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
        )
        audience = self._audience(identity.user)
        session = EdgeSession(now_ms, start)
        connection: Connection
        limit = settings.max_write_buffer_bytes
        if websocket:
            connection = WebSocketConnection(
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
        audience.join(connection)
        if received:
            connection.data_received(received)
        return connection

    def _audience(self, user: UserKey) -> Audience:
        audience = self._audiences.get(user)
        if audience is None:
            attachment = Attachment(
                boot_ms(),
                user,
                self.settings.limits.messages_per_minute,
                self._command_ids,
                self._random.randrange(1001),
            )
            audience = self._audiences[user] = Audience(self, user, attachment)
            self._metrics.users.set(len(self._audiences))
        return audience

    # ---- requests without a connection

    async def command(self, user: UserKey, body: UserCommand, traceparent: str) -> CommandOutcome:
        """Send one command and wait for its outcome. Raises StewardError(MANAGER_UNAVAILABLE)."""
        audience = self._audience(user)
        future: asyncio.Future[CommandOutcome] = self._loop.create_future()

        def settle(outcome: CommandOutcome) -> None:
            if not future.done():
                future.set_result(outcome)

        audience.enter(traceparent)
        try:
            audience.command(traceparent, body, settle)
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
        return await self.nodes.read_events(user, wanted, await self._near(user))

    async def threads(self, user: UserKey, limit: int, page: str) -> ThreadPage:
        """Threads, newest first, from any live node. Raises StewardError."""
        return await self.nodes.list_threads(user, limit, page, await self._near(user))

    async def _near(self, user: UserKey) -> Placement:
        audience = self._audiences.get(user)
        if audience is not None and audience.placement is not None:
            return audience.placement
        return await self.registry.resolve(user, 0)

    # ---- Surroundings

    def read_page(self, audience: Audience, connection: Connection, page: ReadPage) -> None:
        task = self._loop.create_task(self._read(audience, connection, page))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, audience: Audience, connection: Connection, page: ReadPage) -> None:
        """Read until there is something, the connection is gone, or it can't be had."""
        wanted = EventRange(page.after, page.until, PAGE_EVENTS)
        wait_s = 0.02
        while connection.transport is not None and not connection.session.closing:
            try:
                async with self._reads:
                    read = await self.nodes.read_events(audience.user, wanted, audience.placement)
            except StewardError as error:
                if error.reason is Reason.POSITION_COMPACTED:
                    connection.handle(ReadFailed())
                    return
            else:
                if read.events:
                    connection.handle(_page(read, connection.session, page.after + 1))
                    return
            await asyncio.sleep(wait_s * self._random.uniform(0.5, 1.0))
            wait_s = min(wait_s * 2, 1.0)

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
            self._metrics.resumes.labels(resume=resume.value).inc()
            self._metrics.attach_seconds.observe((boot_ms() - connection.opened_ms) / 1000)

    def received(self) -> None:
        self._frames_in.inc()

    def sent(self, effect: Send) -> None:
        if effect.kind == "error":
            self._metrics.errors.labels(reason=effect.reason).inc()

    def gap(self) -> None:
        self._metrics.refusals.labels(kind="delivery_gap").inc()

    def leaving(self, connection: Connection, code: int) -> None:
        # A client may close with any code: as a label each would be a series of its own.
        own = code < 3000 or code in OWN_CODES
        self._metrics.closes.labels(code=str(code) if own else "other").inc()

    def lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._open[connection.KIND].dec()
        if not self._connections:
            self._empty.set()

    def over(self, audience: Audience) -> None:
        if self._audiences.get(audience.user) is audience:
            del self._audiences[audience.user]
            self._metrics.users.set(len(self._audiences))

    # ---- what peers say

    def answered(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            audience = self._audiences.get(answer.user)
            if audience is not None:
                audience.handle(Answered(answer))

    def delivered(self, deliveries: Sequence[Delivery]) -> None:
        """The hot path: stored events to the sockets of their users."""
        self._flusher.begin()
        audiences = self._audiences
        traced = self.tracing.enabled
        began_ns = time.time_ns() if traced else 0
        written = 0
        for delivery in deliveries:
            audience = audiences.get(delivery.user)
            if audience is None:
                continue
            taken = audience.deliver(delivery)
            if taken is None:
                self._dropped.inc()
                continue
            written += taken * len(delivery.events)
            if traced:
                self._trace(delivery, began_ns, taken)
        if written:
            self._events_out.inc(written)

    def _trace(self, delivery: Delivery, began_ns: int, taken: int) -> None:
        for event in delivery.events:
            at = event.find(_TRACE_FIELD)
            if at < 0:
                continue
            at += len(_TRACE_FIELD)
            trace = event[at : at + 55].decode("ascii", "replace")
            if is_sampled(trace):
                attributes = {"steward.connections": taken}
                self.tracing.record("edge.deliver", trace, began_ns, attributes)

    def node_lost(self, incarnation: NodeIncarnation, why: str, *, reached: bool) -> None:
        if self.draining and not self._connections:
            return
        _log.info("stream to %s/%d over: %s", incarnation.node_id, incarnation.node_rev, why)
        if not reached:
            self.registry.report_unreachable(incarnation, why)
        self._tell(incarnation, fenced=False)

    def node_fenced(self, incarnation: NodeIncarnation, cause: str) -> None:
        _log.info("node %s/%d fenced: %s", incarnation.node_id, incarnation.node_rev, cause)
        self._tell(incarnation, fenced=True)

    def _tell(self, incarnation: NodeIncarnation, *, fenced: bool) -> None:
        for audience in list(self._audiences.values()):
            placement = audience.placement
            if placement is not None and placement.incarnation == incarnation:
                audience.handle(NodeLost(incarnation, fenced))

    def placement_moved(self, placement: Placement) -> None:
        audience = self._audiences.get(placement.user)
        if audience is not None:
            audience.handle(PlacementMoved(placement))

    def user_revoked(self, user: UserKey, issued_before_ms: int) -> None:
        audience = self._audiences.get(user)
        for connection in audience.connections if audience is not None else ():
            if connection.session.issued_at_ms < issued_before_ms:
                connection.handle(End(Reason.TOKEN_REVOKED))


def _page(read: EventPage, session: EdgeSession, first: int) -> PageRead | ReadFailed:
    """The page as a command: only what continues exactly is one."""
    expected = range(first, first + len(read.events))
    if read.stream_id != session.stream_id or read.sequences != list(expected):
        return ReadFailed()
    return PageRead(EventBatch(first, read.events))
