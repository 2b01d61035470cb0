"""What a manager asks of its host. Every effect waits for the records that were made before it."""

from dataclasses import dataclass

from agent_service.core.journal import Append
from steward.errors import Reason
from steward.model.keys import EdgeId, Epoch, RunId, Sequence, StreamId, ThreadId
from steward.model.verbs import EventType, Outcome, RunKey, VerbsAcknowledged


@dataclass(frozen=True, slots=True)
class WriteAppend:
    """Send to the log; answer with `FinishAppend`. `types`: of its events, for counting."""

    append: Append
    types: tuple[EventType, ...]


@dataclass(frozen=True, slots=True)
class Deliver:
    """Stored events, consecutive from `first`, for these edges."""

    edges: tuple[EdgeId, ...]
    first: Sequence
    last: Sequence
    payloads: tuple[bytes, ...]


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
class StartRun:
    """Call the agent. `until` is the sequence of agent_started: the history goes up to there."""

    key: RunKey
    agent: str
    thread_id: ThreadId
    content: bytes
    attempt: int
    traceparent: str
    until: Sequence


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
class AcknowledgeVerbs:
    acknowledged: VerbsAcknowledged


@dataclass(frozen=True, slots=True)
class EndManager:
    """This manager is over; drop it, tell its edges. `fence`: the higher epoch, 0 if released."""

    fence: Epoch
    reason: Reason
    cause: str


Effect = (
    WriteAppend
    | Deliver
    | AnswerAttached
    | AnswerAccepted
    | AnswerCancelled
    | AnswerRefused
    | StartRun
    | StopRun
    | CountRun
    | AcknowledgeVerbs
    | EndManager
)
