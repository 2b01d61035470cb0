"""What an agent asks of its manager: the values that cross from the agent loop to the host's loop.

Agents run in a thread of their own; each verb becomes one of these and travels in
batches. `number` counts the verbs of one run from 1 without gaps, and the manager acknowledges
cumulatively (`VerbsAcknowledged`) once the records are in the log.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
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


class RecordStep(NamedTuple):
    """Keep the result of a finished step (JSON), without an event; forgotten when the run ends."""

    key: RunKey
    number: int
    step_id: str
    value: bytes


class RepeatCall(NamedTuple):
    """A tool call that an earlier attempt announced is going to be executed again.

    Its tool_executing is in the stream already; this renews the intent under the epoch of
    this execution, and the tool starts after it is acknowledged.
    """

    key: RunKey
    number: int
    tool_call_id: str


Verb = EmitEvent | FinishRun | RecordStep | RepeatCall


class VerbsAcknowledged(NamedTuple):
    """All verbs of this run up to `number` are in the log."""

    key: RunKey
    number: int


class JournalEntry(NamedTuple):
    """One event that an earlier attempt of this run has stored: its type and `data` (JSON)."""

    type: EventType
    data: bytes


@dataclass(frozen=True, slots=True)
class RunJournal:
    """What earlier attempts have done: a later one repeats none of it.

    `events` are those of the run after its agent_started, in the order of the stream;
    `steps` are results of finished steps, step id -> JSON. `on_crash` of open tool calls is the
    agent's to apply when it comes to them again.
    """

    events: tuple[JournalEntry, ...] = ()
    steps: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class RunStart:
    """All that an agent function needs to begin.

    `content` is the user's message: a string or a list of parts (JSON values). `messages` is
    the thread's history, oldest first, ending with the current input: `{role, content, run_id}`.
    `state` is the user's durable state. `deadline_ms` is on CLOCK_BOOTTIME; 0 means none. `attempt`
    counts executions of this run from 1; `journal` is empty at the first.
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
    journal: RunJournal = RunJournal()
