"""A small host: it owns a real AgentLoop, records every verb, and acknowledges as told."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from agent_service.host.agent_loop import AgentLoop
from steward.agent.definition import define
from steward.agent.loading import AgentCatalog
from steward.model.keys import Epoch, RunId, ThreadId, UserKey
from steward.model.verbs import (
    EmitEvent,
    EventType,
    FinishRun,
    RunKey,
    RunStart,
    Verb,
    VerbsAcknowledged,
)
from steward.telemetry.catalog import AgentMetrics

PATIENCE_S = 10.0


class RecordingHost:
    """Everything the manager would see. `hold` keeps acknowledgements back."""

    def __init__(self, *agents: Callable[..., Any], **options: Any) -> None:
        self.verbs: list[Verb] = []
        self.batches: list[int] = []
        self.hold = False
        self.hold_types: set[EventType] = set()
        self.metrics = AgentMetrics(CollectorRegistry())
        catalog = AgentCatalog(tuple(define(agent) for agent in agents))
        self.loop = AgentLoop(catalog, self._on_verbs, self.metrics, **options)
        self._changed = asyncio.Event()
        self._numbers = itertools.count(1)

    def _on_verbs(self, verbs: list[Verb]) -> None:
        self.verbs.extend(verbs)
        self.batches.append(len(verbs))
        self._changed.set()
        if not self.hold:
            self.acknowledge(verbs)

    def acknowledge(self, verbs: list[Verb] | None = None) -> None:
        last: dict[RunKey, int] = {}
        for verb in self.verbs if verbs is None else verbs:
            last[verb.key] = verb.number
        self.loop.acknowledge([VerbsAcknowledged(key, number) for key, number in last.items()])

    def start(self, content: Any = "hello", agent: str = "", **fields: Any) -> RunKey:
        user = fields.pop("user", "alice")
        key = RunKey(UserKey("default", user), Epoch(7), RunId(f"r{next(self._numbers)}"))
        history = ({"role": "user", "content": content, "run_id": key.run_id},)
        values: dict[str, Any] = {
            "key": key,
            "agent": agent,
            "thread_id": ThreadId("main"),
            "content": content,
            "messages": history,
            "state": {},
            "attempt": 1,
            "traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01",
            **fields,
        }
        self.loop.start_run(RunStart(**values))
        return key

    async def until(self, condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> None:
        """Wait for a condition over the recorded verbs."""
        deadline = time.monotonic() + patience_s
        while not condition():
            self._changed.clear()
            left = deadline - time.monotonic()
            assert left > 0, f"not within {patience_s} s; saw {self.verbs}"
            try:
                await asyncio.wait_for(self._changed.wait(), min(left, 0.05))
            except TimeoutError:
                continue

    async def finished(self, key: RunKey) -> dict[str, Any]:
        """Wait for the end of a run; the data of its FinishRun."""
        await self.until(lambda: any(isinstance(verb, FinishRun) for verb in self.of(key)))
        end = self.of(key)[-1]
        assert isinstance(end, FinishRun)
        data: dict[str, Any] = json.loads(end.data)
        assert data["outcome"] == end.outcome.value
        return data

    async def run(self, content: Any = "hello", agent: str = "", **fields: Any) -> "Recorded":
        key = self.start(content, agent, **fields)
        end = await self.finished(key)
        return Recorded(key, self.of(key), end)

    async def run_probe(self) -> None:
        """Wait until the agent loop has done all that was put to it before, and one turn more."""
        turned = asyncio.Event()
        loop = asyncio.get_running_loop()
        agents = self.loop.thread_loop

        def answer() -> None:
            agents.call_soon(loop.call_soon_threadsafe, turned.set)

        agents.call_soon_threadsafe(answer)
        await asyncio.wait_for(turned.wait(), PATIENCE_S)

    def of(self, key: RunKey) -> list[Verb]:
        return [verb for verb in self.verbs if verb.key == key]

    def events(self, key: RunKey) -> list[tuple[str, dict[str, Any]]]:
        return [
            (verb.type.value, json.loads(verb.data))
            for verb in self.of(key)
            if isinstance(verb, EmitEvent)
        ]


class Recorded:
    """A run that has ended."""

    def __init__(self, key: RunKey, verbs: list[Verb], end: dict[str, Any]) -> None:
        self.key = key
        self.verbs = verbs
        self.end = end
        self.emitted = [verb for verb in verbs if isinstance(verb, EmitEvent)]
        self.events = [(verb.type.value, json.loads(verb.data)) for verb in self.emitted]
        assert [verb.number for verb in verbs] == list(range(1, len(verbs) + 1))
        assert sum(isinstance(verb, FinishRun) for verb in verbs) == 1

    @property
    def types(self) -> list[str]:
        return [type for type, _ in self.events]

    def data(self, type: str) -> list[dict[str, Any]]:
        return [data for kind, data in self.events if kind == type]


Serve = Callable[..., AbstractAsyncContextManager[RecordingHost]]


@pytest.fixture
def serve() -> Serve:
    """`async with serve(agent, ...) as host:` runs agents on a real agent loop."""

    @asynccontextmanager
    async def serving(*agents: Callable[..., Any], **options: Any) -> AsyncIterator[RecordingHost]:
        host = RecordingHost(*agents, **options)
        host.loop.start()
        try:
            yield host
        finally:
            await host.loop.stop(3.0)

    return serving
