"""A run that is cut and resumed: a log that commits so many verbs and no more, then a new attempt.

`Story` is the manager as far as a run can see it: it stores what it acknowledges, makes
the first thought of an agent that has none, and starts the next attempt with the journal.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from agent_service.host.agent_runs import AgentRuns, CancelRun, Command, RunSilenced
from steward.agent.definition import define
from steward.agent.loading import AgentCatalog
from steward.model.keys import Epoch, RunId, ThreadId, UserKey
from steward.model.verbs import (
    EmitEvent,
    EventType,
    FinishRun,
    JournalEntry,
    RecordStep,
    RepeatCall,
    RunJournal,
    RunKey,
    RunStart,
    Verb,
    VerbsAcknowledged,
)
from steward.telemetry.catalog import AgentMetrics

PATIENCE_S = 10.0
WORKING = b'{"thought":"Working","delta":false}'
RUN_ID = RunId("r1")

Event = tuple[str, dict[str, Any]]


class AnsweredAtOnce:
    """Every verb is acknowledged as soon as it is put: nobody has to ask for it."""

    def begin_wait(self) -> None:
        pass

    def end_wait(self) -> None:
        pass


@dataclass
class Story:
    """One run over all its attempts. `journal` is what is stored of it."""

    loop: asyncio.AbstractEventLoop
    agent: Callable[..., Any]
    content: str = "hello"
    state: dict[str, Any] = field(default_factory=dict)
    journal: list[JournalEntry] = field(default_factory=list)
    steps: dict[str, bytes] = field(default_factory=dict)
    recorded: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    end: dict[str, Any] | None = None
    attempts: int = 0
    committed: int = 0

    def attempt(self, cut: int | None = None) -> "Story":
        """Execute once more; crash when `cut` verbs are stored, or run to the end."""
        self.loop.run_until_complete(asyncio.wait_for(self._attempt(cut), PATIENCE_S))
        return self

    def told(self, cuts: Sequence[int]) -> "Story":
        """Attempts that crash after so many stored verbs each, and then one to the end."""
        for cut in cuts:
            if self.end is None:
                self.attempt(cut)
        return self if self.end is not None else self.attempt()

    async def _attempt(self, cut: int | None) -> None:
        self.attempts += 1
        self.committed = 0
        key = RunKey(UserKey("default", "alice"), Epoch(6 + self.attempts), RUN_ID)
        over = asyncio.Event()
        thought = any(entry.type is EventType.AGENT_THINKING for entry in self.journal)

        def put(verb: Verb | RunSilenced) -> None:
            nonlocal thought
            if isinstance(verb, RunSilenced) or over.is_set():
                return
            if cut is not None and self.committed >= cut:
                over.set()
                return
            assert verb.key == key
            self.committed += 1
            assert verb.number == self.committed
            match verb:
                case EmitEvent():
                    first = verb.type in (EventType.AGENT_TEXT, EventType.TOOL_EXECUTING)
                    if first and not thought:
                        self.journal.append(JournalEntry(EventType.AGENT_THINKING, WORKING))
                    thought |= first or verb.type is EventType.AGENT_THINKING
                    # As the manager reads it back: not the very bytes that were put.
                    self.journal.append(
                        JournalEntry(verb.type, json.dumps(json.loads(verb.data)).encode())
                    )
                    if verb.state:
                        self.state = json.loads(verb.state)
                case RecordStep():
                    self.recorded.append(verb.step_id)
                    self.steps[verb.step_id] = verb.value
                case RepeatCall():
                    self.repeated.append(verb.tool_call_id)
                case FinishRun():
                    self.end = json.loads(verb.data)
                    over.set()
            done: list[Command] = [VerbsAcknowledged(key, verb.number)]
            self.loop.call_soon(runs.handle, done)

        catalog = AgentCatalog((define(self.agent),))
        metrics = AgentMetrics(CollectorRegistry())
        waits = AnsweredAtOnce()
        runs = AgentRuns(self.loop, catalog, put, waits, metrics, cancel_grace_s=1.0, max_threads=8)
        messages = ({"role": "user", "content": self.content, "run_id": RUN_ID},)
        runs.handle(
            [
                RunStart(
                    key,
                    "",
                    ThreadId("main"),
                    self.content,
                    messages,
                    self.state,
                    self.attempts,
                    "00-" + "1" * 32 + "-" + "2" * 16 + "-01",
                    journal=RunJournal(tuple(self.journal), dict(self.steps)),
                )
            ]
        )
        await over.wait()
        runs.handle([CancelRun(key)])
        await runs.stop(1.0)

    @property
    def events(self) -> list[Event]:
        """All stored events, without what no two runs have in common."""
        found = []
        for entry in self.journal:
            data = json.loads(entry.data)
            data.pop("duration_ms", None)
            found.append((entry.type.value, data))
        return found

    @property
    def said(self) -> str:
        """What a client has seen of the answer, in the order in which it saw it."""
        return "".join(data["delta"] for type, data in self.events if type == "agent_text")

    def of(self, *types: str) -> list[Event]:
        return [event for event in self.events if event[0] in types]


Tell = Callable[..., Story]


@pytest.fixture
def tell() -> Iterator[Tell]:
    """`tell(agent)` is a story on an event loop of its own."""
    loops: list[asyncio.AbstractEventLoop] = []

    def begin(agent: Callable[..., Any], **fields: Any) -> Story:
        loop = asyncio.new_event_loop()
        loops.append(loop)
        return Story(loop, agent, **fields)

    yield begin
    for loop in loops:
        loop.close()
