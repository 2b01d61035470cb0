"""What an edge asks of a user's manager, and what comes back, as values.

These mirror the bodies of `EdgeCommand` and `Answer` in `agent_service.proto`; only
`edge.convert` knows both.
"""

from dataclasses import dataclass
from typing import NamedTuple

from steward.errors import ERRORS, Reason
from steward.model.keys import Epoch, StreamId, UserKey


@dataclass(frozen=True, slots=True)
class Attach:
    """From now on every event of the user goes to this edge.

    `gap_ms`: how long ago this edge lost the manager that it had; 0 at a first attach.
    `channel`: what stands for the user in packed deliveries; 0 for none.
    """

    gap_ms: int = 0
    channel: int = 0


@dataclass(frozen=True, slots=True)
class Detach:
    """Nobody at this edge listens any more. Not answered."""


@dataclass(frozen=True, slots=True)
class SubmitMessage:
    """A user's message. `content` is JSON; empty `agent` and `overlap` mean the default."""

    id: str
    content: bytes
    thread_id: str
    agent: str = ""
    overlap: str = ""
    trace: str = ""
    """What the client says that it belongs to: a traceparent, if it is one."""


@dataclass(frozen=True, slots=True)
class CancelRun:
    """End a run, named by itself or by its thread (the other is empty)."""

    run_id: str = ""
    thread_id: str = ""


@dataclass(frozen=True, slots=True)
class SubmitInput:
    """The answer to an `input_requested`. `value` is JSON."""

    request_id: str
    value: bytes


@dataclass(frozen=True, slots=True)
class AnnounceClient:
    """A connection with this client id has come here. Not answered; others hear `ClientTaken`."""

    client_id: str


UserCommand = SubmitMessage | CancelRun | SubmitInput
CommandBody = Attach | Detach | AnnounceClient | UserCommand


@dataclass(frozen=True, slots=True)
class EdgeCommand:
    """One command on the stream to a node. `command_id` is unique within that stream."""

    user: UserKey
    epoch: Epoch
    command_id: int
    traceparent: str
    body: CommandBody


@dataclass(frozen=True, slots=True)
class Attached:
    """The attach is registered; `sequence` was the last one stored then."""

    stream_id: StreamId
    sequence: int
    oldest: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """The message is in the log at `sequence`. `queue_position` 0: it does not wait."""

    id: str
    run_id: str
    sequence: int
    duplicate: bool
    queue_position: int


@dataclass(frozen=True, slots=True)
class CancelAccepted:
    run_id: str


@dataclass(frozen=True, slots=True)
class InputAccepted:
    request_id: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A row of the error table. `known_epoch`: what the node knows, 0 when it says nothing."""

    reason: Reason
    message: str
    retry_after_ms: int = 0
    known_epoch: int = 0

    @property
    def inside_only(self) -> bool:
        """Whether this tells the edge to look for the manager elsewhere, and the client nothing."""
        row = ERRORS[self.reason]
        return row.close_code is None and row.http_status is None


@dataclass(frozen=True, slots=True)
class ManagerLost:
    """The manager of `epoch` is gone from its node: resolve again, above it."""

    reason: str
    known_epoch: int


@dataclass(frozen=True, slots=True)
class ClientTaken:
    """Nobody asked: a connection with this client id has come to another edge."""

    client_id: str


CommandOutcome = Accepted | CancelAccepted | InputAccepted | Refused
AnswerBody = Attached | CommandOutcome | ManagerLost | ClientTaken


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node says about one user. `command_id` 0: nobody asked."""

    user: UserKey
    epoch: Epoch
    command_id: int
    body: AnswerBody


class TraceAnnounced(NamedTuple):
    """An event that comes with a delivery, or soon, is sampled.

    Whose it is, is said by the channel of its delivery, or else by the user.
    """

    channel: int
    user: UserKey | None
    sequence: int
    traceparent: str


class Delivery(NamedTuple):
    """Stored events of one user, consecutive from `first`. `epoch` is that of the sender.

    A tuple, since one is made for every delivery: a frozen dataclass takes four times as long.
    """

    user: UserKey
    epoch: Epoch
    first: int
    events: list[bytes]
