"""The durable state of a manager: changed by `evolve` alone, rebuilt from what `seal` returned."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from agent_service.core.facts import (
    CallClosed,
    CallOpened,
    Fact,
    MessageAccepted,
    MessageForgotten,
    OwnerChanged,
    RunClosed,
    RunOpened,
    StateSaved,
    StepForgotten,
    StepRecorded,
    ThreadTouched,
    fact_of,
)
from agent_service.core.journal import Record, RecordKind
from steward.model.keys import RunId, ThreadId


@dataclass(slots=True)
class RunState:
    """One open run: what is durable of it, and what belongs to this execution alone.

    `executing` are the open calls that this execution announced or repeated; `cut` says that one
    was refused since the manager is leaving; `stopped` that the agent was told to end.
    """

    opened: RunOpened
    calls: dict[str, CallOpened] = field(default_factory=dict)
    steps: dict[str, bytes] = field(default_factory=dict)
    thought: bool = False
    verbs: int = 0
    executing: set[str] = field(default_factory=set)
    cut: bool = False
    stopped: bool = False

    @property
    def started(self) -> bool:
        return self.opened.started_ms > 0


class ManagerState:
    """Messages, runs, queues, state and owner of one user."""

    __slots__ = ("active", "messages", "owner", "queues", "run_ids", "runs", "state")

    def __init__(self, records: Iterable[Record]) -> None:
        self.messages: dict[str, MessageAccepted] = {}
        self.run_ids: dict[RunId, str] = {}
        self.runs: dict[RunId, RunState] = {}
        self.active: dict[ThreadId, RunId] = {}
        self.queues: dict[ThreadId, list[RunId]] = {}
        self.state = b"{}"
        self.owner: OwnerChanged | None = None
        facts = [fact_of(record) for record in records if record.kind is not RecordKind.THREAD]
        for fact in sorted(facts, key=_replay_order):
            self.evolve(fact)

    def evolve(self, fact: Fact) -> None:
        """Apply one fact."""
        match fact:
            case MessageAccepted():
                self.messages[fact.id] = fact
                self.run_ids[fact.run_id] = fact.id
            case MessageForgotten():
                forgotten = self.messages.pop(fact.id, None)
                if forgotten is not None:
                    self.run_ids.pop(forgotten.run_id, None)
            case RunOpened():
                self._open(fact)
            case RunClosed():
                self._close(fact.run_id)
            case CallOpened():
                run = self.runs.get(fact.run_id)
                if run is not None:
                    run.calls[fact.call_id] = fact
            case CallClosed():
                for run in self.runs.values():
                    if run.calls.pop(fact.call_id, None) is not None:
                        run.executing.discard(fact.call_id)
                        break
            case StepRecorded():
                run = self.runs.get(fact.run_id)
                if run is not None:
                    run.steps[fact.step_id] = fact.value
            case StepForgotten():
                run = self.runs.get(fact.run_id)
                if run is not None:
                    run.steps.pop(fact.step_id, None)
            case StateSaved():
                self.state = fact.state
            case OwnerChanged():
                self.owner = fact
            case ThreadTouched():
                pass

    def queue_position(self, run_id: RunId) -> int:
        """1 for the next of its thread; 0 for a run that does not wait."""
        run = self.runs.get(run_id)
        if run is None or run.started:
            return 0
        return self.queues[run.opened.thread_id].index(run_id) + 1

    def waiting(self) -> int:
        """How many runs wait, over all threads."""
        return sum(len(queue) for queue in self.queues.values())

    def _open(self, fact: RunOpened) -> None:
        known = self.runs.get(fact.run_id)
        if known is None:
            self.runs[fact.run_id] = RunState(fact)
        else:
            known.opened = fact
        queue = self.queues.setdefault(fact.thread_id, [])
        if fact.started_ms:
            if fact.run_id in queue:
                queue.remove(fact.run_id)
            self.active[fact.thread_id] = fact.run_id
        elif fact.run_id not in queue:
            queue.append(fact.run_id)
        if not queue:
            del self.queues[fact.thread_id]

    def _close(self, run_id: RunId) -> None:
        run = self.runs.pop(run_id, None)
        if run is None:
            return
        thread_id = run.opened.thread_id
        if self.active.get(thread_id) == run_id:
            del self.active[thread_id]
        queue = self.queues.get(thread_id, [])
        if run_id in queue:
            queue.remove(run_id)
            if not queue:
                del self.queues[thread_id]


def _replay_order(fact: Fact) -> tuple[int, int]:
    """Records come back by key: messages and runs replay by sequence, calls after their runs."""
    if isinstance(fact, MessageAccepted | RunOpened):
        return (0, fact.sequence)
    if isinstance(fact, CallOpened):
        return (1, fact.at_ms)
    return (2, 0)
