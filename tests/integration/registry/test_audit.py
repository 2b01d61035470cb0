"""The audit in PostgreSQL: all that a registry records, for SQL, and past the loss of its store."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from steward.rpc.roles import Role
from steward.testing.postgres import PostgresServer
from steward.v1 import placement_pb2
from steward.v1 import registry_service_pb2 as pb

pytestmark = pytest.mark.asyncio


class Audit:
    """What is in the database, as an operator asks for it."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def rows(self, sql: str, setting: str = "SET steward.scope = 'all'") -> list[Any]:
        connection = await asyncpg.connect(self.url)
        try:
            await connection.execute(setting)
            return [tuple(row) for row in await connection.fetch(sql)]
        except asyncpg.UndefinedTableError:
            return []
        finally:
            await connection.close()

    async def numbers(self, table: str = "violation") -> list[tuple[int, int]]:
        return await self.rows(
            f"SELECT era, number FROM steward_audit.{table} ORDER BY era, number"
        )


@pytest_asyncio.fixture
async def audit(postgres_server: PostgresServer) -> AsyncIterator[Audit]:
    name = await postgres_server.make_database()
    yield Audit(postgres_server.url(name))
    await postgres_server.drop_database(name)


async def report(clients: Any, *users: str) -> None:
    client = clients.of(Role.AGENT)
    for user in users:
        tenant, _, name = user.partition("/")
        key = placement_pb2.UserKey(tenant_id=tenant, user_id=name)
        violation = pb.Violation(kind="stale_append", user=key, epoch=7, evidence="was late")
        await client.stub.ReportViolations(
            pb.ReportViolationsRequest(violations=[violation]),
            metadata=client.metadata(),
            timeout=15,
        )


async def test_violations_and_the_ledger_are_copied_with_their_numbers(
    tmp_path: Path, make_registry: Callable[..., Any], clients_of: Any, audit: Audit, until: Any
) -> None:
    registry = make_registry(tmp_path / "data", audit=audit.url)
    registry.start()
    clients = clients_of(registry)
    node, edge = clients.node("node-0"), clients.edge("edge-0")
    await node.join()
    await edge.connect()
    await edge.resolve("ann", "bob")
    await report(clients, "acme/ann", "globex/\\eve")

    async def copied() -> bool:
        ledger = await audit.rows("SELECT kind FROM steward_audit.ledger ORDER BY number")
        return ledger.count(("place",)) == 2 and len(await audit.numbers()) == 2

    await until(copied)
    assert await audit.rows(
        "SELECT cluster, era, number, severity, kind, tenant, epoch, reporter, evidence, count"
        " FROM steward_audit.violation ORDER BY number"
    ) == [
        ("test", 1, 1, "refusal", "stale_append", "acme", 7, "agent:agent-test", "was late", 1),
        ("test", 1, 2, "refusal", "stale_append", "globex", 7, "agent:agent-test", "was late", 1),
    ]
    operator = clients.of(Role.OPERATOR)
    answer = await operator.stub.ReadLedger(
        pb.ReadLedgerRequest(limit=100), metadata=operator.metadata(), timeout=5
    )
    entries = sorted(answer.entries, key=lambda entry: entry.number)
    assert await audit.rows(
        "SELECT number, kind, user_id, epoch, node_id FROM steward_audit.ledger ORDER BY number"
    ) == [(e.number, e.kind, e.user.user_id, e.epoch, e.node_id) for e in entries]
    seen = await audit.rows(
        "SELECT tenant FROM steward_audit.violation", "SET steward.tenants = '{acme}'"
    )
    assert seen == [("acme",)], "of one tenant"
    assert await audit.rows("SELECT * FROM steward_audit.violation", "SELECT 1") == []
    await clients.close()


async def test_a_registry_serves_without_its_audit_and_catches_up_when_it_is_back(
    tmp_path: Path,
    make_registry: Callable[..., Any],
    clients_of: Any,
    own_server: PostgresServer,
    until: Any,
) -> None:
    audit = Audit(own_server.url(await own_server.make_database()))
    own_server.end()
    registry = make_registry(tmp_path / "data", audit=audit.url)
    registry.start()
    clients = clients_of(registry)
    await report(clients, *(f"acme/u{n}" for n in range(3)))
    await asyncio.to_thread(own_server.start)

    async def has(number: int) -> bool:
        return await audit.numbers() == [(1, n) for n in range(1, number + 1)]

    await until(lambda: has(3))
    await asyncio.to_thread(own_server.kill)
    await report(clients, "acme/meanwhile")
    await asyncio.to_thread(own_server.start)
    await report(clients, "acme/later")
    await until(lambda: has(5))
    registry.stop()
    registry.start()
    await report(clients, "acme/after")
    await until(lambda: has(6))
    assert await audit.rows("SELECT DISTINCT evidence FROM steward_audit.violation") == [
        ("was late",)
    ]
    await clients.close()


async def test_a_store_that_lost_its_past_begins_an_era_and_overwrites_nothing(
    tmp_path: Path, make_registry: Callable[..., Any], clients_of: Any, audit: Audit, until: Any
) -> None:
    for era, names in enumerate((("acme/old",), ("acme/new", "acme/newer", "acme/newest")), 1):
        registry = make_registry(tmp_path / f"data-{era}", audit=audit.url)
        if era == 2:
            (tmp_path / "data-2").mkdir()
            shutil.copytree(tmp_path / "data-1" / "keys", tmp_path / "data-2" / "keys")
        registry.start()
        clients = clients_of(registry)
        await report(clients, *names)

        async def copied(era: int = era, number: int = len(names)) -> bool:
            return [row for row in await audit.numbers() if row[0] == era] == [
                (era, n) for n in range(1, number + 1)
            ]

        await until(copied)
        await clients.close()
        registry.stop()
    users = "SELECT user_id FROM steward_audit.violation ORDER BY era, number"
    assert await audit.rows(users) == [("old",), ("new",), ("newer",), ("newest",)]


async def test_copies_that_are_too_old_go_and_the_newest_stays(
    tmp_path: Path, make_registry: Callable[..., Any], clients_of: Any, audit: Audit, until: Any
) -> None:
    registry = make_registry(tmp_path / "data", audit=audit.url)
    registry.start()
    clients = clients_of(registry)
    await report(clients, "acme/a", "acme/b", "acme/c")

    async def has(*numbers: int) -> bool:
        return await audit.numbers() == [(1, number) for number in numbers]

    await until(lambda: has(1, 2, 3))
    registry.stop()
    # A tenth of a millisecond.
    registry.start(**{"audit-days": "0.000000001"})
    await until(lambda: has(3))
    await report(clients, "acme/d")
    await until(lambda: has(3, 4))
    operator = clients.of(Role.OPERATOR)
    answer = await operator.stub.ListViolations(
        pb.ListViolationsRequest(), metadata=operator.metadata(), timeout=5
    )
    assert answer.refusals == 4, "the registry's own are not touched"
    await clients.close()


async def test_an_audit_that_can_not_be_used_is_no_reason_to_end(
    tmp_path: Path,
    make_registry: Callable[..., Any],
    clients_of: Any,
    postgres_server: PostgresServer,
) -> None:
    registry = make_registry(tmp_path / "data", audit=postgres_server.url("nowhere"))
    registry.start()
    clients = clients_of(registry)
    await report(clients, "acme/a")
    assert registry.ready()
    await clients.close()
