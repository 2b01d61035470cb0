"""Agents in the simulation: each run thinks, calls tools, says something and ends.

What a run does depends on its id alone, so that a later attempt goes on where the log
says that the one before stopped. A tool starts after its intent was acknowledged, as
the real agent loop does it.
"""

import random
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import orjson

from agent_service.core.commands import RecallThought
from agent_service.core.effects import StartRun
from steward.model.keys import UserKey
from steward.model.verbs import EmitEvent, EventType, FinishRun, Outcome, RepeatCall, Verb

RETRY_MS = 250


class RunHost(Protocol):
    """What a run needs of its host. `node` is its process, `live` the manager that runs it."""

    node: Any

    def handle(self, live: Any, command: Any) -> None: ...

    def verbs(self, user: UserKey, verbs: tuple[Verb, ...]) -> None: ...

    def acted(self, live: Any, what: str) -> None: ...

    def stored_events(self, user: UserKey, run_id: str) -> list[dict[str, Any]]: ...


class _Step(NamedTuple):
    type: EventType
    data: dict[str, Any]
    call_id: str = ""
    repeat: bool = False


def script_of(run_id: str) -> list[_Step]:
    """What the agent of this run says and calls, in order."""
    luck = random.Random(run_id)
    steps: list[_Step] = []
    if luck.random() < 0.8:
        steps.append(_Step(EventType.AGENT_THINKING, {"thought": "hm", "delta": False}))
    for number in range(luck.choice((0, 1, 1, 2))):
        call = {"tool_call_id": f"{run_id}.t.{number}", "tool_name": "t"}
        called: dict[str, Any] = {**call, "arguments": {}}
        done: dict[str, Any] = {**call, "success": True, "result": 1, "duration_ms": 1}
        steps.append(_Step(EventType.TOOL_EXECUTING, called, call["tool_call_id"]))
        steps.append(_Step(EventType.TOOL_COMPLETED, done, call["tool_call_id"]))
    text = {"message_id": f"{run_id}.m1", "delta": "word "}
    steps.extend([_Step(EventType.AGENT_TEXT, text)] * luck.randint(1, 4))
    return steps


def left_of(script: list[_Step], events: list[dict[str, Any]]) -> list[_Step]:
    """The part of the script that the events of the run do not show yet."""
    seen: dict[str, int] = {}
    for event in events:
        kind = event["type"] + event["data"].get("tool_call_id", "")
        seen[kind] = seen.get(kind, 0) + 1
    left: list[_Step] = []
    for step in script:
        kind = step.type + step.call_id
        if seen.get(kind, 0):
            seen[kind] -= 1
            called = step.type is EventType.TOOL_EXECUTING
            if called and not seen.get(EventType.TOOL_COMPLETED + step.call_id):
                left.append(step._replace(repeat=True))
        else:
            left.append(step)
    return left


class PlayedRun:
    """One execution of a run on a node."""

    def __init__(self, host: RunHost, live: Any, start: StartRun) -> None:
        self._host = host
        self._node = host.node
        self._world = host.node.world
        self._live = live
        self._start = start
        self._number = 0
        self._acknowledged = 0
        self._waiting: list[tuple[int, Callable[[], None]]] = []
        self._over = False
        self._steps: deque[_Step] = deque()

    def prepare(self) -> None:
        """Read the history, as soon as the log can be read, then go on."""
        if self._over:
            return
        if not self._node.log.connected:
            self._node.after(RETRY_MS, self.prepare)
            return
        run_id = self._start.key.run_id
        steps = script_of(run_id)
        if self._start.attempt > 1:
            events = self._host.stored_events(self._start.key.user, run_id)
            steps = left_of(steps, events)
            if any(event["type"] == EventType.AGENT_THINKING for event in events):
                self._host.handle(self._live, RecallThought(self._start.key.run_id))
        self._steps = deque(steps)
        self._go_on()

    def stop(self) -> None:
        self._over = True

    def acknowledged(self, number: int) -> None:
        self._acknowledged = max(self._acknowledged, number)
        ready = [then for at, then in self._waiting if at <= self._acknowledged]
        self._waiting = [(at, then) for at, then in self._waiting if at > self._acknowledged]
        for then in ready:
            then()

    def _go_on(self) -> None:
        self._node.after(self._world.between(0, 60), self._say)

    def _say(self) -> None:
        """A few steps at once, up to a tool, which waits for the log."""
        if self._over:
            return
        verbs: list[Verb] = []
        call_id = ""
        for _ in range(self._world.between(1, 3)):
            if not self._steps:
                break
            step = self._steps.popleft()
            verbs.append(self._verb(step))
            if step.type is EventType.TOOL_EXECUTING:
                call_id = step.call_id
                break
        if not self._steps and not call_id:
            end = orjson.dumps({"outcome": "success", "response": "word"})
            self._number += 1
            verbs.append(FinishRun(self._start.key, self._number, Outcome.SUCCESS, end))
        announced = self._number
        if call_id:
            self.announce(announced, lambda: self._call_tool(call_id))
        elif self._steps:
            self._go_on()
        self._host.verbs(self._start.key.user, tuple(verbs))

    def announce(self, number: int, start: Callable[[], None]) -> None:
        """Start a tool once verb `number`, its intent, is in the log."""
        self._waiting.append((number, start))

    def _verb(self, step: _Step) -> Verb:
        self._number += 1
        key = self._start.key
        if step.repeat:
            return RepeatCall(key, self._number, step.call_id)
        return EmitEvent(key, self._number, step.type, orjson.dumps(step.data), step.call_id)

    def _call_tool(self, call_id: str) -> None:
        if self._over:
            return
        key = self._start.key
        self._host.acted(self._live, "tool")
        self._world.note("{}: tool {} starts under {}", self._node.process, call_id, key.epoch)
        self._node.invariants.tool_started(key.user, key.epoch, call_id)
        self._node.after(self._world.between(1, 120), self._say)
