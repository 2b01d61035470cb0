"""What a manager is told: commands of edges, verbs of agents, outcomes of the log."""

from dataclasses import dataclass
from typing import NamedTuple

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
class AnnounceClient:
    """A connection with this client id is at this edge now: all others end theirs. Not answered."""

    edge_id: EdgeId
    client_id: str


class ApplyVerbs(NamedTuple):
    """What agents of this user asked for, in the order of each run."""

    verbs: tuple[Verb, ...]


class FinishAppend(NamedTuple):
    """The log has answered the append that was in flight."""

    append_number: int
    outcome: AppendOutcome


@dataclass(frozen=True, slots=True)
class Fence:
    """Somebody knows of a higher epoch: this manager is over."""

    fence: Epoch


@dataclass(frozen=True, slots=True)
class RecallThought:
    """The journal of a resumed run holds a thought, so that none has to be made up for it.

    Comes before the first verb of the execution.
    """

    run_id: RunId


@dataclass(frozen=True, slots=True)
class AbandonRun:
    """This run can't be executed here: end it as failed, with this error."""

    run_id: RunId
    error_type: str
    message: str


@dataclass(frozen=True, slots=True)
class Release:
    """Planned end without a successor (stop, passivation).

    Nothing new begins; when every run is at a boundary, or at `until_ms` (boot clock; the past
    means now), who let go and why is written, and the manager ends. Safe to send again with an
    earlier time, and at that time.
    """

    cause: str
    until_ms: int = 0


@dataclass(frozen=True, slots=True)
class HandOff:
    """Planned move: as `Release`, but another node's manager goes on at once."""

    cause: str
    until_ms: int = 0


@dataclass(frozen=True, slots=True)
class Evict:
    """An operator ends this user's sessions: cancel every run, then let go."""

    cause: str


Command = (
    AttachEdge
    | DetachEdge
    | SubmitMessage
    | CancelRun
    | SubmitInput
    | AnnounceClient
    | ApplyVerbs
    | FinishAppend
    | RecallThought
    | AbandonRun
    | Fence
    | Release
    | HandOff
    | Evict
)
