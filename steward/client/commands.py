"""What goes into a `ClientSession` and what comes out of it, as values.

Frames are JSON objects as they travel (`docs/wire-protocol.md`). `random` is a number in
[0, 1) that the driver draws, so that the machine itself is deterministic.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from steward.errors import Reason

Frame = Mapping[str, Any]


class SessionState(StrEnum):
    """Where a session is. It changes only inside `ClientSession.handle`."""

    CONNECTING = "CONNECTING"
    OPEN = "OPEN"
    RESUMING = "RESUMING"
    CLOSED = "CLOSED"


@dataclass(frozen=True, slots=True)
class Start:
    """Dial for the first time."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message came on the current socket. `frame` is None when it was no JSON text."""

    frame: Any
    random: float = 0.0


@dataclass(frozen=True, slots=True)
class Closed:
    """The current socket closed after it had been upgraded. `reason` is the close frame's text."""

    code: int
    reason: str = ""
    random: float = 0.0


@dataclass(frozen=True, slots=True)
class Refused:
    """The upgrade did not happen. `status` 0: no answer, or no token could be had."""

    status: int
    reason: str = ""
    message: str = ""
    retry_after_ms: int = 0
    random: float = 0.0


@dataclass(frozen=True, slots=True)
class Send:
    """The application sends a `user_message`; `size` is its encoded length in bytes."""

    frame: Frame
    size: int = 0


@dataclass(frozen=True, slots=True)
class Post:
    """A `cancel` or `user_input`: written once, now or at the next `ready`."""

    frame: Frame


@dataclass(frozen=True, slots=True)
class Ack:
    """Tell the server what was seen; dropped unless OPEN."""

    sequence: int
    digest: str = ""


@dataclass(frozen=True, slots=True)
class NewToken:
    """The answer to `RefreshToken`."""

    token: str


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline passed. Early ticks do nothing."""

    random: float = 0.0


@dataclass(frozen=True, slots=True)
class Close:
    """The application is done. Safe to give twice."""


Command = Start | Received | Closed | Refused | Send | Post | Ack | NewToken | Tick | Close


@dataclass(frozen=True, slots=True)
class Open:
    """Dial. What still comes from an older socket must not reach the session any more."""

    after: int | None
    stream: str
    new_token: bool


@dataclass(frozen=True, slots=True)
class Shut:
    """Close the current socket, or stop dialling. The session wants to hear no more of it."""

    code: int
    why: str


@dataclass(frozen=True, slots=True)
class Write:
    """Send one text message on the current socket."""

    frame: Frame


@dataclass(frozen=True, slots=True)
class Opened:
    """`ready` came. After `reset` the application drops what it has of the stream."""

    resume: str
    stream_id: str
    sequence: int
    frame: Frame


@dataclass(frozen=True, slots=True)
class Deliver:
    """Give this event to the application: next in order, never seen before."""

    sequence: int
    frame: Frame


@dataclass(frozen=True, slots=True)
class MessageAccepted:
    """A `Send` is in the log. `queue_position` 0: started or over."""

    id: str
    run_id: str
    sequence: int
    duplicate: bool
    queue_position: int


@dataclass(frozen=True, slots=True)
class MessageFailed:
    """A `Send` was refused, or nobody will ever know. `reason` None: the application closed."""

    id: str
    reason: Reason | None
    message: str
    retry_after_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """The server refused something that was no message of this session."""

    reason: str
    message: str
    ref: str = ""


@dataclass(frozen=True, slots=True)
class RefreshToken:
    """Get a new token and give it as `NewToken`."""


@dataclass(frozen=True, slots=True)
class Ended:
    """It is over for good. `reason` None: the application closed."""

    reason: Reason | None
    message: str


Effect = (
    Open
    | Shut
    | Write
    | Opened
    | Deliver
    | MessageAccepted
    | MessageFailed
    | Problem
    | RefreshToken
    | Ended
)
