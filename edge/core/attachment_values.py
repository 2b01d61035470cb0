"""What goes into an `Attachment` and what comes out: its commands, its effects."""

from dataclasses import dataclass

from edge.core.commands import Answer, CommandOutcome, EdgeCommand, UserCommand
from edge.core.resume import StreamHead
from steward.errors import Reason
from steward.model.keys import NodeIncarnation, StreamId
from steward.model.placement import Placement

# ---- commands


@dataclass(frozen=True, slots=True)
class Occupied:
    """Somebody is connected, or waits for an answer; the trace of how they came, if sampled."""

    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Vacated:
    """Nobody is, any more."""


@dataclass(frozen=True, slots=True)
class Resolved:
    placement: Placement


@dataclass(frozen=True, slots=True)
class ResolveFailed:
    reason: Reason
    retry_after_ms: int = 0


@dataclass(frozen=True, slots=True)
class Answered:
    answer: Answer


@dataclass(frozen=True, slots=True)
class NodeLost:
    """This incarnation can't be talked to. `fenced`: by the registry's word, for good.

    `wait_ms`: look for the next manager only after this, since many users were lost at once.
    """

    incarnation: NodeIncarnation
    fenced: bool
    wait_ms: int = 0


@dataclass(frozen=True, slots=True)
class PlacementMoved:
    placement: Placement


@dataclass(frozen=True, slots=True)
class Evicted:
    """An operator ended this user's sessions: nobody here is to be attached again."""


@dataclass(frozen=True, slots=True)
class Behind:
    """A connection has seen more than this edge: ask the manager how far the stream is."""


@dataclass(frozen=True, slots=True)
class Trimmed:
    """The log has the events of this stream from `oldest` on only."""

    stream_id: StreamId
    oldest: int


@dataclass(frozen=True, slots=True)
class ClientCame:
    """A connection with this client id is here: older ones elsewhere are to end."""

    client_id: str


@dataclass(frozen=True, slots=True)
class ClientLeft:
    """No connection with this client id is here any more."""

    client_id: str


@dataclass(frozen=True, slots=True)
class Submit:
    """A command of a client. `ticket` names it towards the driver, once."""

    ticket: int
    traceparent: str
    body: UserCommand


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Command = (
    Occupied
    | Vacated
    | Resolved
    | ResolveFailed
    | Answered
    | NodeLost
    | PlacementMoved
    | Evicted
    | Behind
    | Trimmed
    | ClientCame
    | ClientLeft
    | Submit
    | Tick
)


# ---- effects


@dataclass(frozen=True, slots=True)
class ResolveManager:
    """Ask the registry; the answer comes as `Resolved` or `ResolveFailed`, always."""

    min_epoch: int
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class SendCommand:
    """Send on the stream to this placement's node; it is opened if need be."""

    placement: Placement
    command: EdgeCommand


@dataclass(frozen=True, slots=True)
class HeadKnown:
    """Attached: tell every session."""

    head: StreamHead


@dataclass(frozen=True, slots=True)
class HeadRefreshed:
    """The answer to `Behind`: tell the sessions that were not ready yet."""

    head: StreamHead


@dataclass(frozen=True, slots=True)
class SearchFailed:
    """This attempt failed: tell the sessions that were never ready."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Settle:
    """The outcome of the command with this ticket."""

    ticket: int
    outcome: CommandOutcome


@dataclass(frozen=True, slots=True)
class EndClient:
    """Another edge has a newer connection with this client id: end the one here."""

    client_id: str


@dataclass(frozen=True, slots=True)
class EndSessions:
    """End every connection of the user, for this reason."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Over:
    """Nobody needs this attachment any more: forget it."""


Effect = (
    ResolveManager
    | SendCommand
    | HeadKnown
    | HeadRefreshed
    | SearchFailed
    | Settle
    | EndClient
    | EndSessions
    | Over
)
