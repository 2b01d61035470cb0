"""`ClientSession`: one client across all of its connections, as a pure state machine.

It decides when to dial and with which position, what is delivered, what is sent again,
and when it is over. It guarantees that no event is delivered twice or out of order,
that a hole is never passed over (it resumes instead), and that a message is sent under
its one id until the server accepted or refused it. It does no I/O, has no clock and no
randomness: the driver (`steward.client.client`) gives time and random numbers as data.
Events whose trace is sampled are acknowledged, at most every 50 ms, so that the trace ends where
the user is. It does not keep events, and it does not repeat `cancel`, `user_input` or `ack`.

The same cases (`protos/testdata/client_session.json`) hold for the JavaScript client.
"""

from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeGuard

from steward.client.commands import (
    Ack,
    Close,
    Closed,
    Command,
    Deliver,
    Effect,
    Ended,
    Frame,
    MessageAccepted,
    MessageFailed,
    NewToken,
    Open,
    Opened,
    Post,
    Problem,
    Received,
    RefreshToken,
    Refused,
    Send,
    SessionState,
    Shut,
    Start,
    Tick,
    Write,
)
from steward.errors import Reason

BACKOFF_FIRST_MS = 250
BACKOFF_MOST_MS = 30_000
BACKOFF_RESET_MS = 10_000
"""A connection that was open for so long starts the backoff over."""

DIAL_MS = 30_000
"""From the dial to `ready`."""

ACK_EVERY_MS = 50
"""The least time between two acknowledgements of sampled events."""

HEARTBEAT_S = 15
"""Until a `ready` says otherwise."""

HEARTBEAT_MOST_S = 86_400

REFRESH_MOST_MS = 60_000
MOST_PENDING = 64

CODE_DONE = 1000
CODE_RESUME = 3000

_STOP_CODES = {
    1009: Reason.MESSAGE_TOO_LARGE,
    4500: Reason.TOKEN_INVALID,
    4501: Reason.PERMISSION_DENIED,
    4502: Reason.PROTOCOL_VIOLATION,
    4503: Reason.USER_EVICTED,
    4504: Reason.CONNECTION_REPLACED,
}
_CODE_TOKEN_EXPIRED = 4001
_STOP_STATUS = {
    401: Reason.TOKEN_INVALID,
    403: Reason.PERMISSION_DENIED,
    404: Reason.NOT_FOUND,
}
_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_REASONS = {reason.value: reason for reason in Reason}


class ClientSession:
    """The machine. `handle` takes a command at a time and returns effects in order.

    `now_ms` is Unix milliseconds that never go back. `after` and `stream` are the position to
    start from; without `after` the session is live only. `renewable` says that the driver can
    get new tokens.
    """

    def __init__(
        self,
        *,
        after: int | None = None,
        stream: str = "",
        renewable: bool = True,
        max_pending: int = MOST_PENDING,
    ) -> None:
        self.state = SessionState.CONNECTING
        self._last = after
        self._stream = stream
        self._anchored = True  # False after a reset: the first event may have any sequence.
        self._epoch = 0
        self._renewable = renewable
        self._max_pending = max_pending
        self._pending: dict[str, Send] = {}
        self._posted: deque[Frame] = deque()
        self._started = False
        self._was_open = False
        self._socket = False  # Dialling, or connected.
        self._attempts = 0
        self._refusals = 0  # 401 in a row.
        self._new_token = False
        self._max_bytes = 0
        self._heartbeat_ms = HEARTBEAT_S * 1000
        self._opened_at = 0
        self._told_until = 0  # RATE_LIMITED said: not before.
        self._end: Ended | None = None
        # Deadlines; None: not running.
        self._wake_at: int | None = None
        self._dial_until: int | None = None
        self._silent_at: int | None = None
        self._refresh_at: int | None = None
        self._leave_at: int | None = None
        self._ack_at: int | None = None
        self._acked_at = -ACK_EVERY_MS
        self._out: list[Effect] = []
        self._handlers: dict[type, Callable[[int, Any], None]] = {
            Start: self._on_start,
            Received: self._on_received,
            Closed: self._on_closed,
            Refused: self._on_refused,
            Send: self._on_send,
            Post: self._on_post,
            Ack: self._on_ack,
            NewToken: self._on_new_token,
            Tick: self._on_tick,
            Close: self._on_close,
        }
        self._frames: dict[str, Callable[[int, Frame, float], None]] = {
            "ready": self._on_ready,
            "accepted": self._on_accepted,
            "error": self._on_error,
            "heartbeat": self._on_heartbeat,
            "going_away": self._on_going_away,
            "authenticated": self._on_authenticated,
        }

    def handle(self, now_ms: int, command: Command) -> list[Effect]:
        """Apply one command; the effects are to be carried out in order. Never raises on input."""
        self._out = []
        self._handlers[type(command)](now_ms, command)
        return self._out

    def next_deadline(self) -> int | None:
        """When a `Tick` is wanted; None: never. May be in the past: then at once."""
        running = [
            at
            for at in (
                self._wake_at,
                self._dial_until,
                self._silent_at,
                self._refresh_at,
                self._leave_at,
                self._ack_at,
            )
            if at is not None
        ]
        return min(running) if running else None

    @property
    def position(self) -> tuple[str, int | None]:
        """Stream and sequence of the last event delivered; None before the first `ready`."""
        return self._stream, self._last

    @property
    def pending(self) -> tuple[str, ...]:
        """Ids of messages that are neither accepted nor refused, oldest first."""
        return tuple(self._pending)

    # -- the application ------------------------------------------------------------

    def _on_start(self, now_ms: int, _: Start) -> None:
        if self._started or self._end is not None:
            return
        self._started = True
        self._open(now_ms)

    def _on_send(self, _: int, command: Send) -> None:
        message_id = str(command.frame["id"])
        if self._end is not None:
            self._out.append(MessageFailed(message_id, self._end.reason, self._end.message))
        elif message_id in self._pending:
            return
        elif len(self._pending) >= self._max_pending:
            self._out.append(
                MessageFailed(
                    message_id,
                    Reason.QUEUE_FULL,
                    f"{self._max_pending} messages wait to be accepted; send when one was",
                )
            )
        else:
            self._pending[message_id] = command
            if self.state is SessionState.OPEN:
                self._write_message(message_id)

    def _on_post(self, _: int, command: Post) -> None:
        if self.state is SessionState.OPEN:
            self._out.append(Write(command.frame))
        elif self._end is None:
            # The oldest goes when full: a late cancel matters more than an early one.
            if len(self._posted) >= self._max_pending:
                self._posted.popleft()
            self._posted.append(command.frame)

    def _on_ack(self, _: int, command: Ack) -> None:
        if self.state is SessionState.OPEN:
            frame: dict[str, Any] = {"type": "ack", "sequence": command.sequence}
            if command.digest:
                frame["digest"] = command.digest
            self._out.append(Write(frame))

    def _acknowledge(self, now_ms: int) -> None:
        """Tell what was delivered, now or soon."""
        due_at = self._acked_at + ACK_EVERY_MS
        if now_ms < due_at:
            self._ack_at = due_at
            return
        self._ack_at = None
        self._acked_at = now_ms
        self._out.append(Write({"type": "ack", "sequence": self._last}))

    def _on_new_token(self, _: int, command: NewToken) -> None:
        if self.state is SessionState.OPEN:
            self._out.append(Write({"type": "auth", "token": command.token}))

    def _on_close(self, _: int, __: Close) -> None:
        if self._end is None:
            if self._socket:
                self._out.append(Shut(CODE_DONE, "done"))
            self._finish(None, "the client was closed")

    # -- the connection ---------------------------------------------------------------

    def _on_closed(self, now_ms: int, command: Closed) -> None:
        if not self._socket:
            return
        code = command.code
        if code == _CODE_TOKEN_EXPIRED and not self._renewable:
            self._finish(Reason.TOKEN_EXPIRED, "the token expired, and there is no other")
        elif code in _STOP_CODES or 4500 <= code <= 4999:
            by_code = _STOP_CODES.get(code, Reason.PERMISSION_DENIED)
            reason = _REASONS.get(command.reason, by_code)
            self._finish(reason, f"the server closed the connection with {code} {reason}")
        else:
            self._new_token = self._new_token or code == _CODE_TOKEN_EXPIRED
            self._lost(now_ms, command.random)

    def _on_refused(self, now_ms: int, command: Refused) -> None:
        if not self._socket or self.state is SessionState.OPEN:
            return
        status = command.status
        if status == 401 and self._renewable and self._refusals == 0:
            self._refusals = 1
            self._new_token = True
            self._disconnect(now_ms, 0)
        elif 400 <= status < 500 and status != 429:
            by_status = _STOP_STATUS.get(status, Reason.PROTOCOL_VIOLATION)
            reason = _REASONS.get(command.reason, by_status)
            self._finish(reason, command.message or f"the server answered with HTTP {status}")
        else:
            self._disconnect(now_ms, command.retry_after_ms + self._backoff(command.random))

    def _on_tick(self, now_ms: int, command: Tick) -> None:
        if self._due(self._wake_at, now_ms):
            self._open(now_ms)
        elif self._due(self._dial_until, now_ms):
            self._resume(now_ms, command.random, "no ready in time")
        elif self._due(self._silent_at, now_ms):
            self._resume(now_ms, command.random, "nothing came for two heartbeats")
        elif self._due(self._leave_at, now_ms):
            self._out.append(Shut(CODE_RESUME, "asked to connect again"))
            self._disconnect(now_ms, 0)
        elif self._due(self._refresh_at, now_ms):
            self._refresh_at = None
            self._out.append(RefreshToken())
        elif self._due(self._ack_at, now_ms):
            self._acknowledge(now_ms)

    def _on_received(self, now_ms: int, command: Received) -> None:
        if not self._socket:
            return
        frame = command.frame
        kind = frame.get("type") if isinstance(frame, dict) else None
        if not isinstance(kind, str):
            self._resume(now_ms, command.random, "a message that is no frame")
            return
        if self.state is SessionState.OPEN:
            self._silent_at = now_ms + 2 * self._heartbeat_ms
        known = self._frames.get(kind)
        if known is not None:
            known(now_ms, frame, command.random)
        elif kind != "pong" and "stream_id" in frame:
            self._on_event(now_ms, frame, command.random)

    # -- frames -----------------------------------------------------------------------

    def _on_ready(self, now_ms: int, frame: Frame, random: float) -> None:
        stream, sequence, resume = (frame.get(k) for k in ("stream_id", "sequence", "resume"))
        positioned = self._last is not None
        if self.state is SessionState.OPEN:
            self._resume(now_ms, random, "a second ready")
            return
        if not isinstance(stream, str) or not _is_count(sequence):
            self._resume(now_ms, random, "a malformed ready")
            return
        if resume == "resumed" and positioned and self._stream not in ("", stream):
            resume = "reset"
        if resume == "reset":
            self._last, self._anchored, self._epoch = 0, False, 0
        elif resume == "new" and not positioned:
            self._last = sequence
        elif resume != "resumed" or not positioned:
            self._resume(now_ms, random, "ready does not fit the position that was asked for")
            return
        self._stream = stream
        self.state = SessionState.OPEN
        self._was_open = True
        self._opened_at = now_ms
        self._refusals = 0
        self._told_until = 0
        self._dial_until = None
        self._take_limits(frame.get("limits"))
        self._silent_at = now_ms + 2 * self._heartbeat_ms
        self._plan_refresh(now_ms, frame.get("token_expires_at"))
        self._out.append(Opened(resume, stream, sequence, frame))
        for message_id in list(self._pending):
            self._write_message(message_id)
        while self._posted:
            self._out.append(Write(self._posted.popleft()))

    def _on_event(self, now_ms: int, frame: Frame, random: float) -> None:
        sequence, epoch = frame.get("sequence"), frame.get("epoch")
        # Of a merged event the first that it stands for.
        first = frame.get("from_sequence", sequence)
        if self.state is not SessionState.OPEN or self._last is None:
            self._resume(now_ms, random, "an event before ready")
        elif not _is_count(sequence) or not _is_count(epoch) or not _is_count(first):
            self._resume(now_ms, random, "a malformed event")
        elif frame["stream_id"] != self._stream:
            self._resume(now_ms, random, "an event of another stream")
        elif sequence <= self._last:
            return
        elif first > sequence or (first != self._last + 1 and self._anchored):
            # Also when it stands for some that were delivered: their text would come twice.
            self._resume(now_ms, random, f"sequence {first} came after {self._last}")
        elif epoch < self._epoch:
            self._resume(now_ms, random, f"epoch {epoch} came after {self._epoch}")
        else:
            self._last, self._epoch, self._anchored = sequence, epoch, True
            self._out.append(Deliver(sequence, frame))
            if _is_sampled(frame.get("trace")):
                self._acknowledge(now_ms)

    def _on_accepted(self, _: int, frame: Frame, __: float) -> None:
        message_id = str(frame.get("id", ""))
        if self._pending.pop(message_id, None) is None:
            return
        sequence, waiting = frame.get("sequence"), frame.get("queue_position")
        self._out.append(
            MessageAccepted(
                id=message_id,
                run_id=str(frame.get("run_id", "")),
                sequence=sequence if _is_count(sequence) else 0,
                duplicate=frame.get("duplicate") is True,
                queue_position=waiting if _is_count(waiting) else 0,
            )
        )

    def _on_error(self, now_ms: int, frame: Frame, _: float) -> None:
        reason, message = str(frame.get("reason", "")), str(frame.get("message", ""))
        told = frame.get("retry_after_ms")
        retry_after_ms = told if _is_count(told) else None
        ref = str(frame.get("ref", ""))
        if self._pending.pop(ref, None) is not None:
            known = _REASONS.get(reason, Reason.INTERNAL)
            self._out.append(MessageFailed(ref, known, message, retry_after_ms))
            return
        if reason == Reason.RATE_LIMITED and retry_after_ms is not None:
            self._told_until = now_ms + retry_after_ms
        self._out.append(Problem(reason, message, ref))

    def _on_heartbeat(self, now_ms: int, frame: Frame, random: float) -> None:
        sequence = frame.get("sequence")
        if self._last is not None and _is_count(sequence) and sequence > self._last:
            self._resume(now_ms, random, f"the stream is at {sequence}, we at {self._last}")

    def _on_going_away(self, now_ms: int, frame: Frame, _: float) -> None:
        delay = frame.get("reconnect_after_ms")
        self._leave_at = now_ms + (delay if _is_count(delay) else 0)

    def _on_authenticated(self, now_ms: int, frame: Frame, _: float) -> None:
        self._plan_refresh(now_ms, frame.get("token_expires_at"))

    # -- inside -------------------------------------------------------------------------

    def _open(self, now_ms: int) -> None:
        self._socket = True
        self._wake_at = None
        self._dial_until = now_ms + DIAL_MS
        new_token, self._new_token = self._new_token, False
        self._out.append(Open(self._last, self._stream, new_token))

    def _resume(self, now_ms: int, random: float, why: str) -> None:
        """Give up the connection and connect again from the last position."""
        self._out.append(Shut(CODE_RESUME, why))
        self._lost(now_ms, random)

    def _lost(self, now_ms: int, random: float) -> None:
        leave_at = self._leave_at
        if leave_at is not None:
            self._disconnect(now_ms, max(0, leave_at - now_ms))
            return
        opened = self.state is SessionState.OPEN
        if opened and now_ms - self._opened_at >= BACKOFF_RESET_MS:
            self._attempts = 0
        told = max(0, self._told_until - now_ms)
        self._disconnect(now_ms, told + self._backoff(random))

    def _disconnect(self, now_ms: int, delay_ms: int) -> None:
        self._socket = False
        self._dial_until = self._silent_at = self._refresh_at = self._leave_at = None
        self._ack_at = None
        self._wake_at = now_ms + delay_ms
        self.state = SessionState.RESUMING if self._was_open else SessionState.CONNECTING

    def _backoff(self, random: float) -> int:
        ceiling = min(BACKOFF_MOST_MS, BACKOFF_FIRST_MS << min(self._attempts, 16))
        self._attempts += 1
        return int(ceiling * random)

    def _finish(self, reason: Reason | None, message: str) -> None:
        self._socket = False
        self._wake_at = self._dial_until = self._silent_at = None
        self._refresh_at = self._leave_at = self._ack_at = None
        self.state = SessionState.CLOSED
        self._end = Ended(reason, message)
        for message_id in self._pending:
            self._out.append(MessageFailed(message_id, reason, message))
        self._pending.clear()
        self._posted.clear()
        self._out.append(self._end)

    def _write_message(self, message_id: str) -> None:
        command = self._pending[message_id]
        if 0 < self._max_bytes < command.size:
            # Written, it would end the whole session with 1009.
            del self._pending[message_id]
            text = f"{command.size} bytes; the server takes at most {self._max_bytes}"
            self._out.append(MessageFailed(message_id, Reason.MESSAGE_TOO_LARGE, text))
        else:
            self._out.append(Write(command.frame))

    def _take_limits(self, limits: object) -> None:
        if not isinstance(limits, dict):
            return
        most, heartbeat = limits.get("max_message_bytes"), limits.get("heartbeat_seconds")
        if _is_count(most):
            self._max_bytes = most
        # The upper bound keeps 1e999 from becoming a time.
        if isinstance(heartbeat, int | float) and 0 < heartbeat <= HEARTBEAT_MOST_S:
            self._heartbeat_ms = int(heartbeat * 1000)

    def _plan_refresh(self, now_ms: int, expires_at: object) -> None:
        expires_ms = _unix_ms(expires_at)
        self._refresh_at = None
        if self._renewable and expires_ms is not None:
            left = max(0, expires_ms - now_ms)
            self._refresh_at = now_ms + left - min(REFRESH_MOST_MS, left // 4)

    @staticmethod
    def _due(deadline: int | None, now_ms: int) -> bool:
        return deadline is not None and now_ms >= deadline


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sampled(trace: object) -> bool:
    """By the last bit of a traceparent."""
    return isinstance(trace, str) and len(trace) == 55 and trace[-1] in "13579bdf"


def _unix_ms(text: object) -> int | None:
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        return None
    return (moment - _UNIX_EPOCH) // timedelta(milliseconds=1)
