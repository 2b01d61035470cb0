"""What a manager is told: commands of edges, verbs of agents, outcomes of the log."""

from dataclasses import dataclass

from agent_service.core.journal import AppendOutcome
from steward.model.keys import EdgeId, Epoch, RunId, ThreadId
from steward.model.verbs import Verb


@dataclass(frozen=True, slots=True)
class AttachEdge:
    """Send every further event to this edge. `gap_ms`: since the edge lost the manager before."""

    edge_id: EdgeId
    command_id: int
    gap_ms: int


@dataclass(frozen=True, slots=True)
class DetachEdge:
    """The edge has no connection of this user any more. Not answered."""

    edge_id: EdgeId


@dataclass(frozen=True, slots=True)
class SubmitMessage:
    """A message. `content` is JSON: a string or a list of parts; `id` the idempotency key."""

    edge_id: EdgeId
    command_id: int
    id: str
    content: bytes
    thread_id: ThreadId
    agent: str
    overlap: str
    traceparent: str


@dataclass(frozen=True, slots=True)
class CancelRun:
    """End a run, named by itself or as the active one of a thread."""

    edge_id: EdgeId
    command_id: int
    run_id: RunId
    thread_id: ThreadId


@dataclass(frozen=True, slots=True)
class SubmitInput:
    """The answer to an `input_requested`. `value` is JSON."""

    edge_id: EdgeId
    command_id: int
    request_id: str
    value: bytes


@dataclass(frozen=True, slots=True)
class ApplyVerbs:
    """What agents of this user asked for, in the order of each run."""

    verbs: tuple[Verb, ...]


@dataclass(frozen=True, slots=True)
class FinishAppend:
    """The log has answered the append that was in flight."""

    append_number: int
    outcome: AppendOutcome


@dataclass(frozen=True, slots=True)
class Fence:
    """Somebody knows of a higher epoch: this manager is over."""

    fence: Epoch


@dataclass(frozen=True, slots=True)
class Release:
    """Planned end (drain, stop): write who let go and why, then take nothing new."""

    cause: str


Command = (
    AttachEdge
    | DetachEdge
    | SubmitMessage
    | CancelRun
    | SubmitInput
    | ApplyVerbs
    | FinishAppend
    | Fence
    | Release
)
