"""One real cluster for the module: three nodes, two edges, agents made for these tests.

Tests kill its processes; `up` repairs it, and each test begins with everything ready.
"""

from collections.abc import AsyncIterator, Callable, Iterator

import aiohttp
import pytest
import pytest_asyncio

from steward.model.keys import DEFAULT_TENANT, UserKey
from steward.rpc.keys import CONTROL_KEY, USER_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.testing.local_cluster import LocalCluster
from steward.testing.tab import many_sockets
from steward.tokens import mint

AGENTS = '''
import asyncio

from steward.agent import agent


async def golden(run):
    """All five events, and what it was told in each of them."""
    told = run.input.text
    await run.think(f"about {told}", step=1, total_steps=2)
    value = await run.tool("reverse", {"text": told}, lambda text: text[::-1])
    await run.say(f"{told} is {value}")
    return f"{told} is {value}"


async def count(run):
    """Says a number every 20 ms, or every 100 ms when asked to do it slowly."""
    await run.think("counting")
    for number in range(25):
        await run.say(f"{run.input.text}:{number} ")
        await asyncio.sleep(0.1 if run.input.text.endswith("slowly") else 0.02)


async def fail(run):
    def broken(text):
        raise LookupError(f"no such thing: {text}")

    await run.tool("broken", {"text": run.input.text}, broken)


async def wait(run):
    await run.think("waiting")

    async def forever():
        await asyncio.Event().wait()

    await run.tool("forever", {}, forever)


@agent("once", on_crash="fail")
async def once(run):
    """The same, and it is not to be called again when its node is lost."""
    await wait(run)
'''
NAMES = ("golden", "count", "fail", "wait", "once")


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """The cluster of the module, started once."""
    directory = tmp_path_factory.mktemp("town")
    agents = directory / "agents_of_ssot.py"
    agents.write_text(AGENTS)
    options = [word for name in NAMES for word in ("--agent", f"{agents}:{name}")]
    cluster = LocalCluster.start(directory, "--agents", "3", *options, edges=2)
    try:
        yield cluster.wait_ready()
    finally:
        cluster.end()


@pytest.fixture
def cluster(town: LocalCluster, clusters_to_show: list[LocalCluster]) -> LocalCluster:
    """The same, with everything ready."""
    clusters_to_show.append(town)
    return town.wait_healed()


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with many_sockets() as session:
        yield session


Token = Callable[..., str]


@pytest.fixture
def token(cluster: LocalCluster) -> Token:
    """`token("alice", tenant=…, ttl_s=…, now_ms=…)`, signed with the cluster's key."""
    key = load_or_create_key(cluster.data, USER_KEY)

    def make(
        user: str, *, tenant: str = DEFAULT_TENANT, ttl_s: int = 600, now_ms: int | None = None
    ) -> str:
        return mint(key, UserKey(tenant, user), ttl_s, now_ms=now_ms)

    return make


@pytest.fixture
def metadata(cluster: LocalCluster) -> Callable[[Role], tuple[tuple[str, str], ...]]:
    """What a process of that role sends with its calls."""
    key = load_or_create_key(cluster.data, CONTROL_KEY)

    def of(role: Role) -> tuple[tuple[str, str], ...]:
        credentials = RoleCredentials(key, role, "steward", f"{role}-test")
        return (("authorization", f"Bearer {credentials.token()}"),)

    return of
