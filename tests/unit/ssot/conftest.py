"""Clusters in this process: the real registry on SQLite, real hosts, log and agents."""

import gc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from agent_service.core.manager import Manager
from agent_service.log.memory import MemoryLog
from registry_service.store.sqlite import SqliteStore
from steward.model.keys import UserKey
from steward.runtime.clock import wall_ms
from steward.testing.cluster import InProcessCluster

AGENTS = '''
import asyncio

KEPT = []


async def echo(run):
    yield run.input.text


async def keep(run):
    """Puts what it is told into everything that an agent can reach."""
    told = run.input.text
    KEPT.append((run.user, run.state, run.messages, run.input))
    run.state["told"] = [*run.state.get("told", []), told]
    await run.think(f"I was told {told}")

    async def hold(value):
        if "fail" in value:
            raise ValueError(f"can't hold {value}")
        return f"held {value}"

    held = await run.tool("hold", {"value": told}, hold)
    await run.emit("held", held)
    return {
        "state": run.state["told"],
        "messages": [message["content"] for message in run.messages if message["role"] == "user"],
        "key": run.idempotency_key("hold"),
    }


async def wait(run):
    await run.think("waiting")
    await asyncio.Event().wait()
'''
NAMES = ("echo", "keep", "wait")

MakeCluster = Callable[..., Any]


@pytest.fixture
def agents(tmp_path: Path) -> list[str]:
    """Entrypoints; the first is the default agent."""
    path = tmp_path / "agents_of_ssot.py"
    path.write_text(AGENTS)
    return [f"{path}:{name}" for name in NAMES]


@pytest_asyncio.fixture
async def make_cluster(tmp_path: Path, agents: list[str]) -> AsyncIterator[MakeCluster]:
    """`await make_cluster(nodes=2, …)`: started, and stopped after the test."""
    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> InProcessCluster:
            store = SqliteStore(tmp_path / "registry.db", wall_ms)
            cluster = InProcessCluster(store, MemoryLog(), agents, **options)
            return await stack.enter_async_context(cluster)

        yield make


@pytest.fixture
def managers(make_cluster: MakeCluster) -> Iterator[Callable[[UserKey], list[Manager]]]:
    """Every manager object of a user that was made in this test, is held, and is not over."""
    # What was there before is none of ours, and is not looked at again and again.
    gc.freeze()

    def find(user: UserKey) -> list[Manager]:
        gc.collect()
        return [
            thing
            for thing in gc.get_objects()
            if isinstance(thing, Manager) and thing.user == user and not thing.over
        ]

    yield find
    gc.unfreeze()
