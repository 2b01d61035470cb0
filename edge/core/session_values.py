"""What goes into an `EdgeSession` and what comes out: its start, its commands, its effects."""

from dataclasses import dataclass

from edge.core.batch import EventBatch
from edge.core.commands import CommandOutcome, UserCommand
from edge.core.resume import ResumePoint, StreamHead
from edge.core.server_messages import Limits
from steward.errors import Reason, StewardError
from steward.model.identity import Identity
from steward.model.keys import ConnectionId, UserKey
from steward.model.violations import ViolationKind


@dataclass(frozen=True, slots=True)
class SessionStart:
    """What a connection begins with. Times are the driver's monotonic milliseconds.

    `heard` says that a client of this kind sends bytes on its own (a WebSocket answers
    pings), so that silence means it is gone. `aged_ms` 0: no limit of age. `merge`: `ready`
    says that deltas may come merged; the driver merges.
    """

    connection_id: ConnectionId
    user: UserKey
    point: ResumePoint
    limits: Limits
    issued_at_ms: int
    expires_ms: int
    expires_text: str
    heard: bool = True
    aged_ms: int = 0
    merge: bool = False


# ---- commands


@dataclass(frozen=True, slots=True)
class TextReceived:
    payload: bytes


@dataclass(frozen=True, slots=True)
class BinaryReceived:
    """A binary message: there are none in this protocol."""


@dataclass(frozen=True, slots=True)
class StreamAttached:
    """The manager feeds this edge, live from `head.sequence + 1`. Also after a failover."""

    head: StreamHead


@dataclass(frozen=True, slots=True)
class AttachFailed:
    """The manager was not found this time; the search goes on."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class PageRead:
    """The stored events that `ReadPage` asked for, or the first of them."""

    batch: EventBatch


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """The page can't be had any more.

    MANAGER_UNAVAILABLE when the log keeps only what comes later: who comes again, begins there.
    """

    reason: Reason = Reason.INTERNAL


@dataclass(frozen=True, slots=True)
class CommandSettled:
    """The manager answered a command. `ref` is the client's id for it, if it gave one."""

    ref: str
    outcome: CommandOutcome


@dataclass(frozen=True, slots=True)
class TokenChecked:
    """The answer to `CheckToken`; the expiry is given on the session's own clock too."""

    identity: Identity | StewardError
    expires_ms: int = 0
    expires_text: str = ""


@dataclass(frozen=True, slots=True)
class Leave:
    """Close, but announce it: `going_away` now, the close after `after_ms`."""

    reason: Reason
    after_ms: int


@dataclass(frozen=True, slots=True)
class End:
    """Close now, for this reason of the error table: its name is the reason of the close."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Violated:
    """The framing was broken; `code` is the WebSocket's own."""

    code: int
    message: str


@dataclass(frozen=True, slots=True)
class PeerLeft:
    """The client closed, or its connection broke: nothing is to be sent any more."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Command = (
    TextReceived
    | BinaryReceived
    | StreamAttached
    | AttachFailed
    | PageRead
    | ReadFailed
    | CommandSettled
    | TokenChecked
    | Leave
    | End
    | Violated
    | PeerLeft
    | Tick
)


# ---- effects


@dataclass(frozen=True, slots=True)
class Send:
    """One message of the edge itself. `kind` is its type, `reason` that of an error."""

    kind: str
    payload: bytes
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SendEvents:
    batch: EventBatch


@dataclass(frozen=True, slots=True)
class SendPing:
    """A ping of the WebSocket itself."""


@dataclass(frozen=True, slots=True)
class ReadPage:
    """Read stored events `after < sequence <= until`, when the socket takes more."""

    after: int
    until: int


@dataclass(frozen=True, slots=True)
class SubmitCommand:
    ref: str
    command: UserCommand


@dataclass(frozen=True, slots=True)
class CheckToken:
    token: str


@dataclass(frozen=True, slots=True)
class Close:
    """Send a close with this code; wait for the peer's until the next deadline."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Abort:
    """The peer did not answer the close: end the connection."""


@dataclass(frozen=True, slots=True)
class Report:
    """A guard worked, or an invariant is broken: the registry keeps it."""

    kind: ViolationKind
    evidence: str
    lost: int = 0
    """Events that the client was shown and that are no more."""


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The client says that it has all events up to `sequence`; for the measures."""

    sequence: int


Effect = (
    Acknowledged
    | Report
    | Send
    | SendEvents
    | SendPing
    | ReadPage
    | SubmitCommand
    | CheckToken
    | Close
    | Abort
)
