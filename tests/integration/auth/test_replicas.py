"""Two real auth processes on one PostgreSQL database, as edges and operators meet them."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from steward.model.keys import UserKey
from steward.rpc.keys import USER_KEY, load_or_create_key
from steward.rpc.roles import Role
from steward.testing.postgres import PostgresServer
from steward.tokens import mint

pytestmark = pytest.mark.asyncio

ALICE = UserKey("default", "alice")
WAIT_S = 20.0


@pytest_asyncio.fixture
async def replicas(
    own_server: PostgresServer, tmp_path: Path, auth_process: Any
) -> AsyncIterator[Any]:
    """Two processes of one cluster: they share the keys, and begin at the same time."""
    url = own_server.url(await own_server.make_database())
    load_or_create_key(tmp_path, USER_KEY)
    running = [auth_process(tmp_path, url) for _ in range(2)]
    try:
        await asyncio.gather(*(process.start() for process in running))
        yield running
    finally:
        for process in running:
            await process.kill()


async def test_tickets_open_once_and_a_revocation_reaches_the_edges_of_both(
    replicas: Any, tmp_path: Path
) -> None:
    one, other = replicas
    token = mint(load_or_create_key(tmp_path, USER_KEY), ALICE, 600, ("chat",))
    async with (
        one.caller(Role.EDGE) as ones,
        other.caller(Role.EDGE) as others,
        one.caller(Role.OPERATOR) as operator,
    ):
        edge, far = await ones.edge("edge-1"), await others.edge("edge-2")
        for _ in range(20):
            ticket = (await edge.issue(token)).ticket_issued.ticket
            answers = await asyncio.gather(edge.redeem(ticket), far.redeem(ticket))
            assert sorted(answer.HasField("identity") for answer in answers) == [False, True]
        mark = await operator.revoke(ALICE)
        assert (await far.check(token)).refusal.reason == "TOKEN_REVOKED"
        for each in (edge, far):
            assert (await each.next_revocation()).issued_before_ms == mark
    assert not (tmp_path / "auth.db").exists()


async def test_a_killed_process_leaves_all_to_the_other_one(replicas: Any, tmp_path: Path) -> None:
    one, other = replicas
    token = mint(load_or_create_key(tmp_path, USER_KEY), ALICE, 600, ("chat",))
    async with one.caller(Role.OPERATOR) as operator:
        code = await operator.create_login(ALICE)
        mark = await operator.revoke(ALICE)
        fresh = await operator.create_login(ALICE)
    await one.kill()
    async with other.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        assert (await edge.next_revocation()).issued_before_ms == mark
        assert (await edge.check(token)).refusal.reason == "TOKEN_REVOKED"
        assert (await edge.log_in(code)).refusal.reason == "TOKEN_REVOKED"
        assert (await edge.log_in(fresh)).HasField("logged_in")
    await one.start()


async def test_readiness_says_that_the_database_is_away_and_returns_with_it(
    replicas: Any, own_server: PostgresServer, tmp_path: Path
) -> None:
    one, _ = replicas
    token = mint(load_or_create_key(tmp_path, USER_KEY), ALICE, 600, ("chat",))

    async def until(ready: bool) -> str:
        deadline = time.monotonic() + WAIT_S
        while bool(why := await one.unready()) is ready:
            assert time.monotonic() < deadline, why
            await asyncio.sleep(0.05)
        return str(why)

    async with one.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        assert (await edge.check(token)).HasField("identity")
        await asyncio.to_thread(own_server.kill)
        assert "auth store's database is out of reach" in await until(False)
        assert (await edge.check(token)).refusal.reason == "STORE_UNAVAILABLE"
        assert (await edge.issue(token)).refusal.reason == "STORE_UNAVAILABLE"
        await asyncio.to_thread(own_server.start)
        await until(True)
        assert (await edge.check(token)).HasField("identity")
        assert (await edge.issue(token)).HasField("ticket_issued")


async def test_a_process_that_starts_before_its_database_waits_and_says_so(
    own_server: PostgresServer, tmp_path: Path, auth_process: Any
) -> None:
    url = own_server.url(await own_server.make_database())
    await asyncio.to_thread(own_server.end)
    process = auth_process(tmp_path, url)
    starting = asyncio.create_task(process.start())
    deadline = time.monotonic() + WAIT_S
    why = ""
    while "out of reach" not in why:
        assert time.monotonic() < deadline and not starting.done()
        await asyncio.sleep(0.05)
        try:
            why = await process.unready()
        except OSError:
            continue  # Its ops port is not open yet.
    await asyncio.to_thread(own_server.start)
    await starting
    await process.kill()


async def test_a_store_that_is_no_postgresql_url_is_refused_in_one_line(
    tmp_path: Path, auth_process: Any
) -> None:
    process = auth_process(tmp_path, "mysql://secret@host/database")
    spawned = await process.spawn(0, 0)
    async with asyncio.timeout(WAIT_S):
        _, stderr = await spawned.communicate()
    assert spawned.returncode == 2
    assert b"auth.store: use a postgresql:// URL" in stderr and b"secret" not in stderr
