"""What an agent asks of its manager: the values that cross from the agent loop to the host's loop.

Agents run in a thread of their own; each verb becomes one of these and travels in
batches. `number` counts the verbs of one run from 1 without gaps, and the manager acknowledges
cumulatively (`VerbsAcknowledged`) once the records are in the log.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from steward.model.keys import Epoch, RunId, ThreadId, UserKey


class EventType(StrEnum):
    """Every type of event of the wire protocol."""

    AGENT_STARTED = "agent_started"
    AGENT_THINKING = "agent_thinking"
    TOOL_EXECUTING = "tool_executing"
    TOOL_COMPLETED = "tool_completed"
    AGENT_COMPLETED = "agent_completed"
    AGENT_TEXT = "agent_text"
    USER_MESSAGE = "user_message"
    INPUT_REQUESTED = "input_requested"
    INPUT_RECEIVED = "input_received"
    STATE_SNAPSHOT = "state_snapshot"
    STATE_DELTA = "state_delta"
    PROGRESS = "progress"
    CUSTOM = "custom"
    MANAGER_MOVED = "manager_moved"


class Outcome(StrEnum):
    """How a run ended."""

    SUCCESS = "success"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"


class RunKey(NamedTuple):
    """One execution of a run: under another epoch it is another execution."""

    user: UserKey
    epoch: Epoch
    run_id: RunId


class EmitEvent(NamedTuple):
    """Append one event of this run. `data` is the JSON object of the event's `data` field.

    A tuple, as one is made per event and a frozen dataclass takes four times as long to make.

    `tool_call_id` is set for tool_executing and tool_completed alone. `state` is the user's
    whole durable state as JSON, for state_delta alone: stored beside the event.
    """

    key: RunKey
    number: int
    type: EventType
    data: bytes
    tool_call_id: str = ""
    state: bytes = b""


@dataclass(frozen=True, slots=True)
class FinishRun:
    """The last verb of a run: `data` is that of agent_completed without `duration_ms`."""

    key: RunKey
    number: int
    outcome: Outcome
    data: bytes


Verb = EmitEvent | FinishRun


@dataclass(frozen=True, slots=True)
class VerbsAcknowledged:
    """All verbs of this run up to `number` are in the log."""

    key: RunKey
    number: int


@dataclass(frozen=True, slots=True)
class RunStart:
    """All that an agent function needs to begin.

    `content` is the user's message: a string or a list of parts (JSON values). `messages` is
    the thread's history, oldest first, ending with the current input: `{role, content, run_id}`.
    `state` is the user's durable state. `deadline_ms` is on CLOCK_BOOTTIME; 0 means none.
    """

    key: RunKey
    agent: str
    thread_id: ThreadId
    content: Any
    messages: tuple[dict[str, Any], ...]
    state: dict[str, Any]
    attempt: int
    traceparent: str
    deadline_ms: int = 0
