"""A manager on the real in-memory log, stepped by hand."""

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from agent_service.core.commands import Command, FinishAppend, SubmitMessage
from agent_service.core.effects import Deliver, Effect, WriteAppend
from agent_service.core.grants import GrantBook
from agent_service.core.journal import Seal, Sealed
from agent_service.core.manager import Manager
from agent_service.core.policy import AgentPolicy, ManagerPolicy
from agent_service.log.memory import LogState
from steward.model.keys import (
    EdgeId,
    Epoch,
    NodeId,
    NodeIncarnation,
    NodeRev,
    StreamId,
    ThreadId,
    UserKey,
)
from steward.model.placement import Placement
from steward.model.verbs import EmitEvent, EventType, FinishRun, Outcome, RunKey

EDGE = EdgeId("edge-0#1")
ALICE = UserKey("default", "alice")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
POLICY = ManagerPolicy(
    (
        AgentPolicy("echo", "queue"),
        AgentPolicy("other", "queue"),
        AgentPolicy("fragile", "queue", "fail"),
    )
)


class World:
    """One log, and managers that are made on it as a node's host would."""

    def __init__(self) -> None:
        self.user = ALICE
        self.log = LogState(lambda: StreamId("stream-of-alice"))
        self.now_ms = 1_000_000
        self.wall_ms = 1_700_000_000_000
        self.delivered: list[dict[str, Any]] = []
        self.effects: list[Effect] = []

    def manager(
        self, epoch: int, node: str = "node-0", user: UserKey = ALICE, gap_ms: int | None = 0
    ) -> Manager:
        incarnation = NodeIncarnation(NodeId(node), NodeRev(epoch))
        book = GrantBook(incarnation)
        book.learn(Placement(user, Epoch(epoch), incarnation.node_id, incarnation.node_rev, "a:1"))
        grant = book.take(user, Epoch(epoch))
        sealed = self.log.seal(Seal(user, Epoch(epoch), f"activation-{epoch}"))
        assert isinstance(sealed, Sealed), sealed
        manager = Manager(grant, sealed, POLICY)
        self.perform(manager, manager.begin(self.now_ms, self.wall_ms, gap_ms, TRACE))
        return manager

    def step(self, manager: Manager, command: Command) -> list[Effect]:
        """Handle a command and all appends that follow; returns every effect."""
        return self.perform(manager, manager.handle(self.now_ms, command, self.wall_ms))

    def perform(self, manager: Manager, effects: list[Effect]) -> list[Effect]:
        done: list[Effect] = []
        waiting = list(effects)
        while waiting:
            effect = waiting.pop(0)
            done.append(effect)
            if isinstance(effect, WriteAppend):
                outcome = self.log.append(effect.append)
                finish = FinishAppend(effect.append.append_number, outcome)
                waiting.extend(manager.handle(self.now_ms, finish, self.wall_ms))
            elif isinstance(effect, Deliver):
                self.delivered.extend(orjson.loads(payload) for payload in effect.payloads)
        self.effects.extend(done)
        return done

    def events(self) -> list[dict[str, Any]]:
        """What the log holds for alice."""
        from agent_service.log.port import ReadRange

        page = self.log.read(ALICE, ReadRange(limit=1000))
        return [orjson.loads(payload) for payload in page.events]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def message() -> Callable[..., SubmitMessage]:
    def make(
        id: str, text: str = "hi", thread: str = "main", agent: str = "", overlap: str = ""
    ) -> SubmitMessage:
        return SubmitMessage(
            EDGE, 1, id, orjson.dumps(text), ThreadId(thread), agent, overlap, TRACE
        )

    return make


@pytest.fixture
def verb() -> Callable[..., EmitEvent]:
    def make(key: RunKey, number: int, type: EventType, data: dict[str, Any]) -> EmitEvent:
        call = data.get("tool_call_id", "")
        return EmitEvent(key, number, type, orjson.dumps(data), call)

    return make


@pytest.fixture
def finish() -> Callable[..., FinishRun]:
    def make(key: RunKey, number: int, outcome: Outcome = Outcome.SUCCESS) -> FinishRun:
        data = orjson.dumps({"outcome": outcome.value, "response": "done"})
        return FinishRun(key, number, outcome, data)

    return make
