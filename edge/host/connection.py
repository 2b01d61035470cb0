"""Connections: a socket, an `EdgeSession`, and nothing else per client.

`Connection` is an asyncio protocol that has taken its transport over after the HTTP
handshake. It feeds the session, does its effects, and collects bytes that the `Flusher`
writes once per loop turn. There is no task, queue, lock or timer per connection. Unsent
bytes are bounded: a connection over the bound ends with SLOW_CONSUMER. Pages of a replay
are asked for only while the socket takes more.

Two kinds: `WebSocketConnection` and `EventStreamConnection` (Server-Sent Events).
"""

import asyncio
import logging
from typing import Protocol, cast

from edge.core.batch import EventBatch
from edge.core.commands import UserCommand
from edge.core.frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    FrameReader,
    FrameViolation,
    encode_close,
    encode_control,
    parse_close,
)
from edge.core.session import EdgeSession, SessionState
from edge.core.session_values import (
    Abort,
    Acknowledged,
    BinaryReceived,
    CheckToken,
    Close,
    Command,
    Effect,
    End,
    PeerLeft,
    ReadPage,
    Report,
    Send,
    SendEvents,
    SendPing,
    SubmitCommand,
    TextReceived,
    Tick,
    Violated,
)
from edge.host.direct import NONE, descriptor_of, write_through
from edge.host.flush import Flusher
from edge.host.wheel import TimerWheel
from steward.errors import Reason
from steward.model.deliveries import encode_text
from steward.model.violations import ViolationKind
from steward.runtime.clock import boot_ms
from steward.telemetry.logs import BUG, fields

_log = logging.getLogger(__name__)
CLOSE_ABNORMAL = 1006
FRAMES_PER_TURN = 64
_PING_FRAME = encode_control(PING)


class Owner(Protocol):
    """What a connection needs of the edge around it."""

    def submit(self, connection: "Connection", ref: str, command: UserCommand) -> None: ...

    def read_page(self, connection: "Connection", page: ReadPage) -> None: ...

    def check_token(self, connection: "Connection", token: str) -> None: ...

    def received(self) -> None:
        """One client message came in (for the count)."""
        ...

    def refused(self, reason: str) -> None:
        """An error goes out to the client (for the count)."""
        ...

    def gap(self, connection: "Connection", batch: EventBatch) -> None:
        """A live batch left a hole before it, which the log fills."""
        ...

    def report(self, kind: ViolationKind, evidence: str, lost: int) -> None:
        """The session saw a refusal or a breach; by it so many events are gone."""
        ...

    def acknowledged(self, connection: "Connection", sequence: int) -> None:
        """The client has all events up to this one."""
        ...

    def leaving(self, connection: "Connection", code: int) -> None:
        """This connection gets no more events. Called once, before `lost`."""
        ...

    def lost(self, connection: "Connection") -> None:
        """The socket is gone. Called once."""
        ...


class Connection(asyncio.Protocol):
    """What both kinds have. Subclasses say how things look on their wire."""

    __slots__ = (
        "_clear",
        "_descriptor",
        "_dirty",
        "_flusher",
        "_gone",
        "_page",
        "_paused",
        "_pending",
        "_wheel",
        "_write_limit",
        "client_id",
        "opened_ms",
        "owner",
        "session",
        "transport",
        "wheel_slot",
    )

    KIND = ""

    def __init__(
        self,
        owner: Owner,
        session: EdgeSession,
        flusher: Flusher,
        wheel: TimerWheel,
        write_limit: int,
        client_id: str,
    ) -> None:
        self.owner = owner
        self.session = session
        self.client_id = client_id
        self.opened_ms = boot_ms()
        self.transport: asyncio.Transport | None = None
        self.wheel_slot = 0
        self._descriptor = NONE
        # The transport holds no bytes and is not to close: what comes may go to the socket now.
        self._clear = False
        self._flusher = flusher
        self._wheel = wheel
        self._write_limit = write_limit
        self._pending: list[bytes] = []
        self._dirty = False
        self._paused = False
        self._page: ReadPage | None = None
        self._gone = False

    # ---- how things look on the wire

    def encode(self, effect: Send) -> bytes:
        raise NotImplementedError

    def encode_batch(self, batch: EventBatch) -> bytes:
        raise NotImplementedError

    def encode_close(self, effect: Close) -> bytes:
        raise NotImplementedError

    def encode_ping(self) -> bytes:
        return b""

    # ---- the hot path

    def take(self, now_ms: int, first: int, following: int, frames: bytes) -> bool:
        """Send live events as the frames that they came in. False: it needs a batch of them."""
        return False

    def deliver(self, batch: EventBatch) -> bool:
        """Give a live batch to this connection. True: it is on its way as it is."""
        if self.session.offer(batch):
            self._pending.append(self.encode_batch(batch))
            if not self._dirty:
                self._dirty = True
                self._flusher.mark(self)
            return True
        was = self.session.state
        self.apply(self.session.repair(boot_ms(), batch))
        if was is SessionState.LIVE and self.session.state is SessionState.CATCHING_UP:
            self.owner.gap(self, batch)
        return False

    def send_events(self, batch: EventBatch) -> None:
        """Send events that the session found to be next."""
        self.write(self.encode_batch(batch))

    def write(self, data: bytes) -> None:
        """Send at the end of this loop turn, with what else there is."""
        self._pending.append(data)
        self._mark()

    def _mark(self) -> None:
        if not self._dirty:
            self._dirty = True
            self._flusher.mark(self)

    def flush(self, now_ms: int) -> None:
        """Write what was collected; end the connection when its peer reads too slowly."""
        self._dirty = False
        pending, transport = self._pending, self.transport
        if transport is None or transport.is_closing():
            pending.clear()
            return
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        pending.clear()
        unsent = 0 if self._clear else transport.get_write_buffer_size()
        if unsent > self._write_limit and not self.session.closing:
            self.handle(End(Reason.SLOW_CONSUMER))
            return
        if data:
            if unsent or self._descriptor < 0:
                transport.write(data)
            else:
                self._clear = write_through(transport, self._descriptor, data)
            self.session.last_out = now_ms
        if self._page is not None and not self._paused:
            self._read_on()

    def _read_on(self) -> None:
        page, self._page = self._page, None
        if page is not None:
            self.owner.read_page(self, page)

    # ---- the session

    def handle(self, command: Command) -> None:
        """Give a command to the session and do what it wants. Never raises."""
        try:
            self.apply(self.session.handle(boot_ms(), command))
        except Exception:
            _log.exception("a connection ended by an error of this process", extra=fields(do=BUG))
            self.abort()

    def apply(self, effects: list[Effect]) -> None:
        """Do the effects in order, then see when the session wants to be woken."""
        self._perform(effects)
        self._reschedule()

    def _reschedule(self) -> None:
        if self.transport is not None:
            self._wheel.schedule(self, self.session.next_deadline())

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendEvents(batch):
                    self.send_events(batch)
                case Send():
                    if effect.reason:
                        self.owner.refused(effect.reason)
                    self.write(self.encode(effect))
                case Report(kind, evidence, lost):
                    self.owner.report(kind, evidence, lost)
                case Acknowledged(sequence):
                    self.owner.acknowledged(self, sequence)
                case SendPing():
                    self.write(self.encode_ping())
                case ReadPage():
                    # Once the socket has taken what goes before it.
                    self._page = effect
                    self._mark()
                case SubmitCommand(ref, command):
                    self.owner.submit(self, ref, command)
                case CheckToken(token):
                    self.owner.check_token(self, token)
                case Close(code):
                    self._leave(code)
                    self.write(self.encode_close(effect))
                    self.closing()
                case Abort():
                    self.abort()

    def closing(self) -> None:
        """The close is on its way. A kind without an answer to it ends here."""

    def on_deadline(self, now_ms: int) -> None:
        """See `Timed`."""
        if self.transport is None:
            return
        if now_ms >= self.session.next_deadline():
            self.handle(Tick())
        self._reschedule()

    def abort(self) -> None:
        """End now, without another word."""
        self._clear = False
        if self.transport is not None:
            self.transport.abort()

    def finish(self) -> None:
        """End when all is sent; the session's deadline bounds it."""
        self.flush(boot_ms())
        self._clear = False
        if self.transport is not None:
            self.transport.close()

    def _leave(self, code: int) -> None:
        if not self._gone:
            self._gone = True
            self.owner.leaving(self, code)

    # ---- the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is ours from here on."""
        self.transport = cast(asyncio.Transport, transport)
        self._descriptor = descriptor_of(transport)
        self._reschedule()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._clear = False
        self._pending.clear()
        self.handle(PeerLeft())
        self._leave(CLOSE_ABNORMAL)
        self.owner.lost(self)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._read_on()


class WebSocketConnection(Connection):
    """A WebSocket: frames in, frames out."""

    __slots__ = ("_reader", "_reading")

    KIND = "websocket"

    def __init__(
        self,
        owner: Owner,
        session: EdgeSession,
        flusher: Flusher,
        wheel: TimerWheel,
        write_limit: int,
        client_id: str,
        max_message_bytes: int,
    ) -> None:
        super().__init__(owner, session, flusher, wheel, write_limit, client_id)
        self._reader: FrameReader | None = FrameReader(max_message_bytes)
        self._reading = True

    def encode(self, effect: Send) -> bytes:
        return encode_text(effect.payload)

    def encode_batch(self, batch: EventBatch) -> bytes:
        return batch.frames()

    def take(self, now_ms: int, first: int, following: int, frames: bytes) -> bool:
        if not self.session.offer_next(first, following):
            return False
        transport = self.transport
        if self._clear and not self._pending and transport is not None:
            # Nothing that came before it waits, and the node joins what goes together.
            self.session.last_out = now_ms
            self._clear = write_through(transport, self._descriptor, frames)
        else:
            self.write(frames)
        return True

    def encode_close(self, effect: Close) -> bytes:
        return encode_close(effect.code, effect.reason)

    def encode_ping(self) -> bytes:
        return _PING_FRAME

    def data_received(self, data: bytes) -> None:
        now_ms = self.session.last_in = boot_ms()
        reader = self._reader
        if reader is None:
            return
        payload = reader.alone(data)
        session = self.session
        if payload is None or not payload.isascii() or not session.accepts_frames:
            reader.receive(data)
            self._pump(now_ms)
            return
        answer = session.answer(payload)
        if answer is not None:
            self.owner.received()
            self.write(encode_text(answer))
        else:
            self._on_text(now_ms, payload)
            self._set_reading(session.accepts_frames)

    def handle(self, command: Command) -> None:
        super().handle(command)
        if not self._reading and self.session.accepts_frames:
            self._set_reading(True)
            self._pump(boot_ms())

    def _pump(self, now_ms: int) -> None:
        """Take frames for as long as the session takes them; else stop reading.

        A chunk may hold thousands of tiny ones: after some of them others have their turn.
        """
        session = self.session
        pong: bytes | None = None
        budget = FRAMES_PER_TURN
        while (reader := self._reader) is not None and not reader.empty and session.accepts_frames:
            if not budget:
                break
            budget -= 1
            try:
                frame = reader.next()
                if frame is None:
                    break
                opcode, payload = frame
                if opcode == TEXT:
                    self._on_text(now_ms, payload)
                elif opcode == PING:
                    # The last of several is enough, says the RFC.
                    pong = payload
                elif opcode == BINARY:
                    self.owner.received()
                    self.handle(BinaryReceived())
                elif opcode == CLOSE:
                    self._on_close(payload)
                # A pong needs nothing: any inbound byte is a sign of life.
            except FrameViolation as violation:
                self._reader = None
                self.handle(Violated(violation.code, violation.message))
        if pong is not None and not session.closing:
            self.write(encode_control(PONG, pong))
        wanted = bool(budget) and session.accepts_frames
        if wanted is not self._reading:
            self._set_reading(wanted)
        if not budget and self.transport is not None:
            asyncio.get_running_loop().call_soon(self._pump_on)

    def _pump_on(self) -> None:
        self._pump(boot_ms())

    def _on_text(self, now_ms: int, payload: bytes) -> None:
        """`handle` for the one command that comes often.

        A message moves no deadline forward, unless it ends the session.
        """
        self.owner.received()
        session = self.session
        try:
            self._perform(session.handle(now_ms, TextReceived(payload)))
        except Exception:
            _log.exception("a connection ended by an error of this process", extra=fields(do=BUG))
            self.abort()
        if session.closing:
            self._reschedule()

    def _on_close(self, payload: bytes) -> None:
        code, _ = parse_close(payload)
        self._reader = None
        if not self.session.closing:
            self.handle(PeerLeft())
            self._leave(code)
            self.write(encode_control(CLOSE, payload[:2]))
        self.finish()

    def _set_reading(self, wanted: bool) -> None:
        transport = self.transport
        if wanted is self._reading or transport is None or transport.is_closing():
            return
        self._reading = wanted
        if wanted:
            transport.resume_reading()
        else:
            transport.pause_reading()


class EventStreamConnection(Connection):
    """Server-Sent Events: nothing comes in, and the end of the response is the close."""

    __slots__ = ()

    KIND = "sse"

    def encode(self, effect: Send) -> bytes:
        if effect.kind == "heartbeat":
            return b": heartbeat\n\n"
        return b"event: %b\ndata: %b\n\n" % (effect.kind.encode(), effect.payload)

    def encode_batch(self, batch: EventBatch) -> bytes:
        return batch.text(self.session.stream_id)

    def encode_close(self, effect: Close) -> bytes:
        return b'event: closed\ndata: {"code":%d}\n\n' % effect.code

    def closing(self) -> None:
        self.finish()
