"""`EdgeSession`: the protocol of one connection, without socket, clock or task.

It guarantees: `ready` is the first message, at most once; then the client sees every
event of its user's stream from its start position on, in order, without gap or repeat,
whatever order live batches, pages of the log and re-attaches come in; nothing that a
client sends raises. What it does not do: framing, flow control (the driver delays a
`ReadPage` until the socket takes more), finding the manager (`attachment.py`).

Commands go in through `handle`, which returns effects in order. The one exception is
`offer`, the hot path: a batch that simply continues a live session makes no objects.

Catching up: the events below `floor` come from the log, those from `floor` on from live
batches that are buffered meanwhile. When the buffer is full it is dropped and `floor`
moves up: the log has those events too.
"""

from collections import deque
from enum import Enum, auto
from typing import Final

from edge.core import server_messages as say
from edge.core.batch import EventBatch
from edge.core.client_messages import (
    Acknowledge,
    Authenticate,
    ClientMessage,
    MessageRefused,
    Ping,
    parse_message,
    parse_ping,
)
from edge.core.commands import Accepted, CommandOutcome, Refused
from edge.core.frames import CLOSE_NORMAL, CLOSE_TOO_LARGE
from edge.core.rate import Strikes
from edge.core.resume import Resume, ResumePoint, StreamHead, decide_resume
from edge.core.session_values import (
    Abort,
    Acknowledged,
    AttachFailed,
    BinaryReceived,
    CheckToken,
    Close,
    Command,
    CommandSettled,
    Effect,
    End,
    Leave,
    PageRead,
    PeerLeft,
    ReadFailed,
    ReadPage,
    Report,
    Send,
    SendEvents,
    SendPing,
    SessionStart,
    StreamAttached,
    SubmitCommand,
    TextReceived,
    Tick,
    TokenChecked,
    Violated,
)
from steward.errors import ERRORS, Reason, StewardError
from steward.model.identity import Identity
from steward.model.keys import StreamId
from steward.model.violations import ViolationKind

MOST_EARLY_FRAMES: Final = 32
MOST_EARLY_BYTES: Final = 256 * 1024
MOST_BUFFERED_BYTES: Final = 256 * 1024
ATTACH_MS: Final = 10_000
CLOSE_MS: Final = 2_000
MOST_VIOLATIONS: Final = 10
MOST_RATE_REFUSALS: Final = 100
AGED_NOTICE_MS: Final = 2_000


class SessionState(Enum):
    """Where a connection is in its life. Only forward, but for LIVE and CATCHING_UP."""

    ATTACHING = auto()
    CATCHING_UP = auto()
    LIVE = auto()
    CLOSING = auto()


# An attribute of an enum is looked up slowly, and this one is for every event.
_LIVE: Final = SessionState.LIVE

_CLOSE_CODES: Final = {
    reason: code
    for reason in Reason
    if (code := StewardError(reason, "").row.close_code) is not None
}


class EdgeSession:
    """One connection's protocol machine. `last_in`, `last_out` are set by the driver."""

    __slots__ = (
        "_aged_ms",
        "_attach_by",
        "_buffer",
        "_buffered_bytes",
        "_checking",
        "_close_by",
        "_early",
        "_early_bytes",
        "_expires_ms",
        "_failure",
        "_last_ping",
        "_leave_at",
        "_leave_reason",
        "_rate_strikes",
        "_reading",
        "_start",
        "_strikes",
        "acknowledged",
        "floor",
        "issued_at_ms",
        "last_in",
        "last_out",
        "next",
        "resume",
        "state",
        "stream_id",
    )

    def __init__(self, now_ms: int, start: SessionStart) -> None:
        self._start = start
        self.state = SessionState.ATTACHING
        self.resume: Resume | None = None
        self.stream_id = StreamId("")
        # Sequence of the next event to send.
        self.next = 0
        self.floor = 0
        self.acknowledged = 0
        self.issued_at_ms = start.issued_at_ms
        self.last_in = self.last_out = self._last_ping = now_ms
        self._attach_by = now_ms + ATTACH_MS
        self._expires_ms = start.expires_ms
        self._aged_ms = start.aged_ms
        self._leave_at = 0
        self._leave_reason = Reason.CONNECTION_AGED
        self._close_by = 0
        self._failure = Reason.MANAGER_UNAVAILABLE
        self._early: deque[bytes | None] | None = None
        self._early_bytes = 0
        self._buffer: deque[EventBatch] | None = None
        self._buffered_bytes = 0
        self._reading = False
        self._checking = False
        self._strikes: Strikes | None = None
        self._rate_strikes: Strikes | None = None

    # ---- the hot path

    def offer(self, batch: EventBatch) -> bool:
        """Take a live batch. True: the driver writes it, as it is, now.

        False: it is to be buffered, or is known already, or the session is not there yet.
        `repair` tells whether something has to be done about it.
        """
        return self.offer_next(batch.first, batch.last + 1)

    def offer_next(self, first: int, following: int) -> bool:
        """`offer` for the events from `first` to before `following`, without a batch of them."""
        if self.next == first and self.state is _LIVE:
            self.next = following
            return True
        return False

    def answer(self, payload: bytes) -> bytes | None:
        """The answer to a ping of a live session. None: `handle` it as `TextReceived`."""
        if self.state is not _LIVE:
            return None
        t = parse_ping(payload)
        return None if t is None else say.pong(t)

    def repair(self, now_ms: int, batch: EventBatch) -> list[Effect]:
        """What to do with a batch that `offer` did not take."""
        if self.state is SessionState.CATCHING_UP:
            self._keep(batch)
            return self._advance()
        if self.state is not SessionState.LIVE or batch.last < self.next:
            return []
        if batch.first <= self.next:
            batch = batch.tail(self.next)
            self.next = batch.last + 1
            return [SendEvents(batch)]
        # A hole before it, which the log has to fill.
        self.state = SessionState.CATCHING_UP
        self.floor = batch.first
        self._keep(batch)
        return self._advance()

    # ---- what the driver asks

    @property
    def accepts_frames(self) -> bool:
        """Whether the driver may go on giving frames; else it stops reading."""
        if self.state is not SessionState.ATTACHING or self._early is None:
            return True
        return len(self._early) < MOST_EARLY_FRAMES and self._early_bytes < MOST_EARLY_BYTES

    @property
    def point(self) -> ResumePoint:
        """What the client had when it came."""
        return self._start.point

    @property
    def connection_id(self) -> str:
        return self._start.connection_id

    @property
    def closing(self) -> bool:
        return self.state is SessionState.CLOSING

    def next_deadline(self) -> int:
        """When the next `Tick` is due at the latest."""
        if self.state is SessionState.CLOSING:
            return self._close_by
        period = self._start.limits.heartbeat_ms
        if self.state is SessionState.ATTACHING:
            due = self._attach_by
        else:
            due = min(self.last_out, self._last_heard()) + period
            if self._start.heard:
                due = min(due, self.last_in + 2 * period)
        due = min(due, self._expires_ms)
        if self._leave_at:
            return min(due, self._leave_at)
        return min(due, self._aged_ms) if self._aged_ms else due

    def _last_heard(self) -> int:
        return max(self.last_in, self._last_ping) if self._start.heard else self.last_out

    # ---- commands

    def handle(self, now_ms: int, command: Command) -> list[Effect]:
        """Apply one command; the effects are to be done in order."""
        if self.state is SessionState.CLOSING:
            if isinstance(command, Tick) and now_ms >= self._close_by:
                return [Abort()]
            return []
        match command:
            case TextReceived(payload):
                return self._on_frame(now_ms, payload)
            case BinaryReceived():
                return self._on_frame(now_ms, None)
            case StreamAttached(head):
                return self._on_attached(now_ms, head)
            case AttachFailed(reason):
                return self._on_attach_failed(now_ms, reason)
            case PageRead(batch):
                return self._on_page(now_ms, batch)
            case ReadFailed(reason):
                return self._end(now_ms, reason)
            case CommandSettled(ref, outcome):
                return self._on_settled(now_ms, ref, outcome)
            case TokenChecked(identity, expires_ms, expires_text):
                return self._on_token(identity, expires_ms, expires_text)
            case Leave(reason, after_ms):
                return self._leave(now_ms, reason, after_ms)
            case End(reason):
                return self._end(now_ms, reason)
            case Violated(code, message):
                if code == CLOSE_TOO_LARGE:
                    return self._end(now_ms, Reason.MESSAGE_TOO_LARGE)
                return self._close(now_ms, code, message)
            case PeerLeft():
                self._close(now_ms, CLOSE_NORMAL, "")
                return []
            case Tick():
                return self._on_tick(now_ms)

    # ---- frames of the client

    def _on_frame(self, now_ms: int, payload: bytes | None) -> list[Effect]:
        if self.state is SessionState.ATTACHING:
            if self._early is None:
                self._early = deque()
            self._early.append(payload)
            self._early_bytes += len(payload or b"")
            return []
        if payload is None:
            return self._violation(now_ms, "binary messages are not part of this protocol", "")
        try:
            message = parse_message(payload)
        except MessageRefused as refused:
            effects = self._violation(now_ms, refused.message, refused.ref)
            if refused.names_user:
                effects.insert(0, Report(ViolationKind.FOREIGN_USER, refused.message))
            return effects
        return self._on_message(message)

    def _on_message(self, message: ClientMessage) -> list[Effect]:
        match message:
            case Ping(t):
                return [Send("pong", say.pong(t))]
            case Acknowledge(sequence):
                if self.acknowledged < sequence < self.next:
                    self.acknowledged = sequence
                    return [Acknowledged(sequence)]
                return []
            case Authenticate(token):
                if self._checking:
                    text = "a token is being checked; wait for its answer"
                    return [_error(Reason.RATE_LIMITED, text, retry_after_ms=1000)]
                self._checking = True
                return [CheckToken(token)]
            case command:
                return [SubmitCommand(getattr(command, "id", ""), command)]

    def _violation(self, now_ms: int, message: str, ref: str) -> list[Effect]:
        effects: list[Effect] = [_error(Reason.PROTOCOL_VIOLATION, message, ref)]
        if self._strikes is None:
            self._strikes = Strikes(MOST_VIOLATIONS)
        if self._strikes.add(now_ms):
            effects += self._end(now_ms, Reason.PROTOCOL_VIOLATION)
        return effects

    def _on_settled(self, now_ms: int, ref: str, outcome: CommandOutcome) -> list[Effect]:
        match outcome:
            case Accepted():
                return [Send("accepted", say.accepted(outcome))]
            case Refused(reason, message, retry_after_ms):
                effects: list[Effect] = [_error(reason, message, ref, retry_after_ms)]
                if reason is Reason.RATE_LIMITED:
                    if self._rate_strikes is None:
                        self._rate_strikes = Strikes(MOST_RATE_REFUSALS)
                    if self._rate_strikes.add(now_ms):
                        effects += self._end(now_ms, reason)
                return effects
            case _:
                return []

    def _on_token(
        self, identity: Identity | StewardError, expires_ms: int, expires_text: str
    ) -> list[Effect]:
        self._checking = False
        if isinstance(identity, StewardError):
            retry = identity.retry_after_ms or 0
            return [_error(identity.reason, identity.message, retry_after_ms=retry)]
        if identity.user != self._start.user:
            return [_error(Reason.PERMISSION_DENIED, "the token is of another user")]
        self._expires_ms = expires_ms
        self.issued_at_ms = identity.issued_at_ms
        return [Send("authenticated", say.authenticated(expires_text))]

    # ---- the stream

    def _on_attached(self, now_ms: int, head: StreamHead) -> list[Effect]:
        if self.state is not SessionState.ATTACHING:
            return self._on_attached_again(now_ms, head)
        start = self._start
        self.resume, self.next = decide_resume(start.point, head)
        self.stream_id = head.stream_id
        self.floor = head.sequence + 1
        self.state = SessionState.CATCHING_UP
        effects: list[Effect] = [
            Send(
                "ready",
                say.ready(
                    start.connection_id,
                    start.user,
                    head,
                    self.resume,
                    start.expires_text,
                    start.limits,
                    merge=start.merge,
                ),
            )
        ]
        effects += self._advance()
        early, self._early, self._early_bytes = self._early, None, 0
        for payload in early or ():
            effects += self._on_frame(now_ms, payload)
            if self.closing:
                break
        return effects

    def _on_attach_failed(self, now_ms: int, reason: Reason) -> list[Effect]:
        if reason not in _CLOSE_CODES:
            reason = Reason.MANAGER_UNAVAILABLE
        if not ERRORS[reason].retry:
            return self._end(now_ms, reason)
        self._failure = reason
        return []

    def _on_attached_again(self, now_ms: int, head: StreamHead) -> list[Effect]:
        if head.stream_id != self.stream_id or head.sequence + 1 < self.next:
            # Erased, or a log that lost what it acknowledged: only a new start can tell.
            effects: list[Effect] = []
            if head.stream_id == self.stream_id:
                text = f"event {self.next - 1} was shown, and the stream ends at {head.sequence}"
                lost = self.next - 1 - head.sequence
                effects.append(Report(ViolationKind.STREAM_WENT_BACK, text, lost))
            return effects + self._end(now_ms, Reason.MANAGER_UNAVAILABLE)
        if self.state is SessionState.LIVE and self.next == head.sequence + 1:
            return []
        # Between the two attaches events may have passed this edge by: the log has them.
        self.state = SessionState.CATCHING_UP
        self._drop_buffer()
        self.floor = head.sequence + 1
        return self._advance()

    def _on_page(self, now_ms: int, batch: EventBatch) -> list[Effect]:
        self._reading = False
        if self.state is not SessionState.CATCHING_UP or batch.last < self.next:
            return self._advance()
        if batch.first > self.next:
            return self._end(now_ms, Reason.INTERNAL)
        batch = batch.tail(self.next)
        self.next = batch.last + 1
        return [SendEvents(batch), *self._advance()]

    def _advance(self) -> list[Effect]:
        """Read on, or join the live stream when the log has given what was missing."""
        if self.state is not SessionState.CATCHING_UP:
            return []
        if self.next < self.floor:
            if self._reading:
                return []
            self._reading = True
            return [ReadPage(self.next - 1, self.floor - 1)]
        self.state = SessionState.LIVE
        effects: list[Effect] = []
        for batch in self._buffer or ():
            if batch.last >= self.next:
                batch = batch.tail(self.next)
                self.next = batch.last + 1
                effects.append(SendEvents(batch))
        self._drop_buffer()
        return effects

    def _keep(self, batch: EventBatch) -> None:
        """Buffer a live batch while catching up, bounded."""
        if batch.last < self.floor:
            return
        end = self._buffer[-1].last + 1 if self._buffer else self.floor
        if batch.last < end:
            return
        if batch.first > end:
            # A hole inside the buffer: what is kept is worth nothing.
            self._drop_buffer()
            self.floor = batch.first
        self._buffered_bytes += batch.size
        if self._buffered_bytes > MOST_BUFFERED_BYTES:
            self._drop_buffer()
            self.floor = batch.last + 1
            return
        if self._buffer is None:
            self._buffer = deque()
        self._buffer.append(batch)

    def _drop_buffer(self) -> None:
        self._buffer = None
        self._buffered_bytes = 0

    # ---- time and the end

    def _on_tick(self, now_ms: int) -> list[Effect]:
        period = self._start.limits.heartbeat_ms
        if now_ms >= self._expires_ms:
            return self._end(now_ms, Reason.TOKEN_EXPIRED)
        if self._leave_at and now_ms >= self._leave_at:
            return self._end(now_ms, self._leave_reason)
        if self.state is SessionState.ATTACHING:
            if now_ms >= self._attach_by:
                return self._end(now_ms, self._failure)
            return []
        if self._start.heard and now_ms >= self.last_in + 2 * period:
            return self._end(now_ms, Reason.HEARTBEAT_TIMEOUT)
        effects: list[Effect] = []
        if not self._leave_at and self._aged_ms and now_ms >= self._aged_ms:
            effects += self._leave(now_ms, Reason.CONNECTION_AGED, AGED_NOTICE_MS)
        silent = now_ms >= self.last_out + period
        if silent or now_ms >= self._last_heard() + period:
            if silent:
                effects.append(Send("heartbeat", say.heartbeat(self.next - 1)))
                self.last_out = now_ms
            if self._start.heard:
                effects.append(SendPing())
                self._last_ping = now_ms
        return effects

    def _leave(self, now_ms: int, reason: Reason, after_ms: int) -> list[Effect]:
        if self._leave_at and self._leave_at <= now_ms + after_ms:
            return []  # It leaves already, and sooner.
        self._leave_at = now_ms + after_ms
        self._leave_reason = reason
        if self.state is SessionState.ATTACHING:
            return []
        return [Send("going_away", say.going_away(after_ms))]

    def _end(self, now_ms: int, reason: Reason) -> list[Effect]:
        return self._close(now_ms, _CLOSE_CODES[reason], reason.value)

    def _close(self, now_ms: int, code: int, reason: str) -> list[Effect]:
        self.state = SessionState.CLOSING
        self._close_by = now_ms + CLOSE_MS
        self._drop_buffer()
        self._early = None
        return [Close(code, reason)]


def _error(reason: Reason, message: str, ref: str = "", retry_after_ms: int = 0) -> Send:
    return Send("error", say.error(reason, message, ref, retry_after_ms), reason.value)
