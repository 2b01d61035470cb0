"""What a manager asks of its host. Every effect waits for the records that were made before it."""

from dataclasses import dataclass
from typing import NamedTuple

from agent_service.core.journal import Append
from steward.errors import Reason
from steward.model.keys import EdgeId, Epoch, RunId, Sequence, StreamId, ThreadId
from steward.model.verbs import EventType, Outcome, RunKey, VerbsAcknowledged

NO_SEQUENCE = Sequence(0)


class WriteAppend(NamedTuple):
    """Send to the log; answer with `FinishAppend`. `types`: of its events, for counting."""

    append: Append
    types: tuple[EventType, ...]


class Deliver(NamedTuple):
    """Stored events, consecutive from `first`, for these edges.

    `traces`: of those whose trace is sampled, the sequence and the context that they were made in.
    """

    edges: tuple[EdgeId, ...]
    first: Sequence
    last: Sequence
    payloads: tuple[bytes, ...]
    traces: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerAttached:
    edge_id: EdgeId
    command_id: int
    stream_id: StreamId
    sequence: Sequence
    oldest_sequence: Sequence
    messages_per_minute: int


@dataclass(frozen=True, slots=True)
class AnswerAccepted:
    """`queue_position` 0: the run started or is over."""

    edge_id: EdgeId
    command_id: int
    id: str
    run_id: RunId
    sequence: Sequence
    duplicate: bool
    queue_position: int


@dataclass(frozen=True, slots=True)
class AnswerCancelled:
    edge_id: EdgeId
    command_id: int
    run_id: RunId


@dataclass(frozen=True, slots=True)
class AnswerRefused:
    edge_id: EdgeId
    command_id: int
    reason: Reason
    message: str
    retry_after_ms: int = 0


@dataclass(frozen=True, slots=True)
class TellClientTaken:
    """These edges end their connections with this client id: there is a newer one elsewhere."""

    edges: tuple[EdgeId, ...]
    client_id: str


@dataclass(frozen=True, slots=True)
class StartRun:
    """Call the agent. The history goes up to `until`, the last event before this execution.

    A later `attempt` gets a journal: the events of the run after `since`, which is the sequence of
    its user_message (0 at the first attempt), and the finished `steps`, (step id, JSON value).
    """

    key: RunKey
    agent: str
    thread_id: ThreadId
    content: bytes
    attempt: int
    traceparent: str
    until: Sequence
    since: Sequence = NO_SEQUENCE
    steps: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class StopRun:
    """The run is over for the manager: cancel what is left of it."""

    key: RunKey


@dataclass(frozen=True, slots=True)
class CountRun:
    """A run has ended."""

    key: RunKey
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class ObserveMove:
    """manager_moved is stored: `cause` and `gap_ms` are those of the event."""

    cause: str
    gap_ms: int


class AcknowledgeVerbs(NamedTuple):
    acknowledged: VerbsAcknowledged


@dataclass(frozen=True, slots=True)
class EndManager:
    """This manager is over; drop it, tell its edges. `fence`: the higher epoch, 0 if released.

    `handoff`: the next node takes over now, and with `activate` also when nobody is connected,
    since there are open runs.
    """

    fence: Epoch
    reason: Reason
    cause: str
    handoff: bool = False
    activate: bool = False


Effect = (
    WriteAppend
    | Deliver
    | AnswerAttached
    | AnswerAccepted
    | AnswerCancelled
    | AnswerRefused
    | TellClientTaken
    | StartRun
    | StopRun
    | CountRun
    | ObserveMove
    | AcknowledgeVerbs
    | EndManager
)
