"""The stage of the golden path: a cluster of real processes here, or a staging cluster elsewhere.

`STEWARD_E2E_URL` (the URL of an edge) and `STEWARD_E2E_TOKEN` (tokens, one per user,
separated by commas) point the same tests at a running cluster. Without them `steward up`
is started once for the module, with all its spans sent to a collector in this process.
"""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from steward.cli.operator_calls import Operator
from steward.model.keys import DEFAULT_TENANT, UserKey
from steward.rpc.keys import USER_KEY, load_or_create_key
from steward.testing.collector import SpanCollector, span_collector
from steward.testing.local_cluster import LocalCluster
from steward.testing.tab import many_sockets
from steward.tokens import mint

ROLES = ("REGISTRY", "AUTH", "LOG", "AGENT", "EDGE")


@dataclass(frozen=True)
class Stage:
    """Where the tests play. `local` is None on a staging cluster."""

    urls: list[str]
    given: list[str]
    local: LocalCluster | None
    collector: SpanCollector | None

    @property
    def url(self) -> str:
        return self.urls[0]

    def tokens(self, *users: str) -> list[str]:
        """A token per user; on staging those that were given, as many as there are."""
        if self.local is None:
            return self.given[: len(users)]
        key = load_or_create_key(self.local.data, USER_KEY)
        return [mint(key, UserKey(DEFAULT_TENANT, user), 600) for user in users]

    async def codes(self, user: str, count: int) -> list[str]:
        """One-use login codes for a user."""
        assert self.local is not None
        auth = self.local.processes["auth"]["grpc"]
        async with Operator.of_data(self.local.data) as operator:
            return [
                await operator.create_login(auth, UserKey(DEFAULT_TENANT, user))
                for _ in range(count)
            ]


@pytest.fixture(scope="module")
def running_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    url = os.environ.get("STEWARD_E2E_URL", "").rstrip("/")
    if url:
        given = [t.strip() for t in os.environ.get("STEWARD_E2E_TOKEN", "").split(",")]
        assert all(given), "STEWARD_E2E_TOKEN: a token, or several for several users"
        yield Stage([url], given, None, None)
        return
    with span_collector() as (collector, endpoint):
        environ = {f"STEWARD_{role}_OTLP_ENDPOINT": endpoint for role in ROLES}
        # Only what a test asks for is sampled.
        environ |= {f"STEWARD_{role}_TRACE_RATIO": "0" for role in ROLES}
        directory = tmp_path_factory.mktemp("stage")
        cluster = LocalCluster.start(directory, edges=2, environ=environ)
        try:
            cluster.wait_ready()
            yield Stage(cluster.urls, [], cluster, collector)
        finally:
            cluster.end()


@pytest.fixture
def stage(running_stage: Stage, clusters_to_show: list[LocalCluster]) -> Stage:
    if running_stage.local is not None:
        clusters_to_show.append(running_stage.local)
    return running_stage


@pytest.fixture
def local_stage(stage: Stage) -> Stage:
    """For what only an operator of the cluster can see or do."""
    if stage.local is None:
        pytest.skip("needs a cluster of its own: STEWARD_E2E_URL is set")
    return stage


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with many_sockets() as session:
        yield session


@pytest.fixture
def log_in(http: aiohttp.ClientSession) -> Callable[..., Any]:
    """`await log_in(url, code)`: HTTP status and body."""

    async def log_in(url: str, code: str) -> tuple[int, dict[str, Any]]:
        async with http.post(f"{url}/v1/login", json={"code": code}) as answer:
            return answer.status, await answer.json()

    return log_in


@pytest.fixture
def get_ticket(http: aiohttp.ClientSession) -> Callable[..., Any]:
    """`await get_ticket(url, token)`: a one-use ticket."""

    async def get_ticket(url: str, token: str) -> str:
        headers = {"Authorization": f"Bearer {token}"}
        async with http.post(f"{url}/v1/tickets", headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            ticket: str = (await answer.json())["ticket"]
            return ticket

    return get_ticket
