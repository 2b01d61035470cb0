"""Clusters in this process whose census runs fast: real registry, hosts, log, agents."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest_asyncio

from agent_service.log.memory import MemoryLog
from registry_service.census.rounds import CensusConfig
from registry_service.store.sqlite import SqliteStore
from steward.runtime.clock import wall_ms
from steward.testing.cluster import InProcessCluster

AGENT = """
async def echo(run):
    yield run.input.text
"""
QUICK = CensusConfig(
    interval_ms=0, answer_ms=1_000, least_ms=50, ties_ms=100, again_ms=60, patience_ms=2_000
)

MakeCluster = Callable[..., Any]


@pytest_asyncio.fixture
async def make_cluster(tmp_path: Path) -> AsyncIterator[MakeCluster]:
    """`await make_cluster(nodes=2, …)`: started, and stopped after the test."""
    path = tmp_path / "agents_of_census.py"
    path.write_text(AGENT)
    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> InProcessCluster:
            store = SqliteStore(tmp_path / "registry.db", wall_ms)
            options = {"census": QUICK, **options}
            cluster = InProcessCluster(store, MemoryLog(), [f"{path}:echo"], **options)
            return await stack.enter_async_context(cluster)

        yield make
