"""Durable facts of a manager, and their form as records of the log.

`decide` (in `manager.py`) makes facts; `ManagerState.evolve` alone applies them, live
and at a restart alike. A fact that is gone again (a run that ended) is a deleted record, so that
what `seal` returns is the state and not its history.
"""

from dataclasses import dataclass

import orjson

from agent_service.core.journal import Record, RecordKind
from steward.model.kept_json import kept_json
from steward.model.keys import Epoch, RunId, Sequence, ThreadId

_OWNER_KEY = "owner"
_STATE_KEY = "state"


@dataclass(frozen=True, slots=True)
class MessageAccepted:
    """The idempotency key of a message is taken. `at_ms` is Unix milliseconds."""

    id: str
    run_id: RunId
    sequence: Sequence
    at_ms: int


@dataclass(frozen=True, slots=True)
class MessageForgotten:
    id: str


@dataclass(frozen=True, slots=True)
class RunOpened:
    """A run waits (`started_ms` 0) or executes. `sequence` is that of its user_message.

    `attempt` counts its executions from 1, `crashes` those that ended with their node.
    """

    run_id: RunId
    thread_id: ThreadId
    agent: str
    sequence: Sequence
    content: bytes
    traceparent: str
    started_ms: int
    attempt: int = 1
    crashes: int = 0


@dataclass(frozen=True, slots=True)
class RunClosed:
    run_id: RunId


@dataclass(frozen=True, slots=True)
class CallOpened:
    """A tool was announced: the intent that comes before its effect."""

    call_id: str
    run_id: RunId
    tool: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class CallClosed:
    call_id: str


@dataclass(frozen=True, slots=True)
class StepRecorded:
    """A finished step of an open run, and the JSON of its value."""

    run_id: RunId
    step_id: str
    value: bytes


@dataclass(frozen=True, slots=True)
class StepForgotten:
    run_id: RunId
    step_id: str


@dataclass(frozen=True, slots=True)
class ThreadTouched:
    """Write-only here: listings read it from the log. The title of the first put is kept."""

    thread_id: ThreadId
    title: str
    sequence: Sequence
    updated_at: str


@dataclass(frozen=True, slots=True)
class StateSaved:
    state: bytes


@dataclass(frozen=True, slots=True)
class OwnerChanged:
    """Who writes this stream. `released`: why a manager let go by plan; empty while it lives.

    `at_ms` is when it let go, Unix milliseconds.
    """

    node_id: str
    epoch: Epoch
    released: str
    at_ms: int = 0


Fact = (
    MessageAccepted
    | MessageForgotten
    | RunOpened
    | RunClosed
    | CallOpened
    | CallClosed
    | StepRecorded
    | StepForgotten
    | ThreadTouched
    | StateSaved
    | OwnerChanged
)


def record_of(fact: Fact) -> Record:
    """The record that stores `fact`."""
    match fact:
        case MessageAccepted(id, run_id, sequence, at_ms):
            value = orjson.dumps({"run": run_id, "sequence": sequence, "at": at_ms})
            return Record(RecordKind.MESSAGE, id, value)
        case MessageForgotten(id):
            return Record(RecordKind.MESSAGE, id, deleted=True)
        case RunOpened():
            value = orjson.dumps(
                {
                    "thread": fact.thread_id,
                    "agent": fact.agent,
                    "sequence": fact.sequence,
                    "content": orjson.Fragment(fact.content),
                    "trace": fact.traceparent,
                    "started": fact.started_ms,
                    "attempt": fact.attempt,
                    "crashes": fact.crashes,
                }
            )
            return Record(RecordKind.RUN, fact.run_id, value)
        case RunClosed(run_id):
            return Record(RecordKind.RUN, run_id, deleted=True)
        case CallOpened(call_id, run_id, tool, at_ms):
            value = orjson.dumps({"run": run_id, "tool": tool, "at": at_ms})
            return Record(RecordKind.CALL, call_id, value)
        case CallClosed(call_id):
            return Record(RecordKind.CALL, call_id, deleted=True)
        case StepRecorded(run_id, step_id, value):
            value = orjson.dumps({"run": run_id, "step": step_id, "value": orjson.Fragment(value)})
            return Record(RecordKind.STEP, _step_key(run_id, step_id), value)
        case StepForgotten(run_id, step_id):
            return Record(RecordKind.STEP, _step_key(run_id, step_id), deleted=True)
        case ThreadTouched(thread_id, title, sequence, updated_at):
            value = orjson.dumps({"title": title, "sequence": sequence, "updated_at": updated_at})
            return Record(RecordKind.THREAD, thread_id, value)
        case StateSaved(state):
            return Record(RecordKind.STATE, _STATE_KEY, state)
        case OwnerChanged(node_id, epoch, released, at_ms):
            value = orjson.dumps(
                {"node": node_id, "epoch": epoch, "released": released, "at": at_ms}
            )
            return Record(RecordKind.OWNER, _OWNER_KEY, value)


def fact_of(record: Record) -> Fact:
    """The fact that a stored record holds. Raises ValueError for one that no fact makes."""
    if record.kind is RecordKind.STATE:
        return StateSaved(record.value)
    value = orjson.loads(record.value)
    match record.kind:
        case RecordKind.MESSAGE:
            return MessageAccepted(
                record.key, RunId(value["run"]), Sequence(value["sequence"]), value["at"]
            )
        case RecordKind.RUN:
            return RunOpened(
                RunId(record.key),
                ThreadId(value["thread"]),
                value["agent"],
                Sequence(value["sequence"]),
                kept_json(value["content"]),
                value["trace"],
                value["started"],
                value.get("attempt", 1),
                value.get("crashes", 0),
            )
        case RecordKind.CALL:
            return CallOpened(record.key, RunId(value["run"]), value["tool"], value["at"])
        case RecordKind.STEP:
            return StepRecorded(RunId(value["run"]), value["step"], kept_json(value["value"]))
        case RecordKind.OWNER:
            return OwnerChanged(
                value["node"], Epoch(value["epoch"]), value["released"], value.get("at", 0)
            )
    raise ValueError(f"a manager can't start from a record of kind {record.kind!r}")


def _step_key(run_id: RunId, step_id: str) -> str:
    """Ids of runs hold no space; names of steps are the author's, and may repeat between runs."""
    return f"{run_id} {step_id}"
