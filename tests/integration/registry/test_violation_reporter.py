"""The reporter of violations against a real registry that is there, slow to come, or away."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.model.violations import Violation, ViolationKind
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.rpc.violations import ViolationReporter
from steward.telemetry.catalog import ServiceMetrics
from steward.v1 import registry_service_pb2 as pb

pytestmark = pytest.mark.asyncio

NODE = NodeIncarnation(NodeId("n1"), NodeRev(3))
STALE, BREACH = ViolationKind.STALE_APPEND, ViolationKind.FOREIGN_EVENT


def violation(user: str = "ann", kind: ViolationKind = STALE, evidence: str = "") -> Violation:
    return Violation(kind, evidence or f"of {user}", UserKey("acme", user), Epoch(7), NODE)


@asynccontextmanager
async def reporter(registry: Any, **options: Any) -> AsyncIterator[ViolationReporter]:
    key = load_or_create_key(registry.data, CONTROL_KEY)
    credentials = RoleCredentials(key, Role.AGENT, "test", "n1")
    made = ViolationReporter(registry.address, credentials, **options)
    try:
        yield made
    finally:
        await made.close()


async def rows(clients: Any) -> list[Any]:
    operator = clients.of(Role.OPERATOR)
    page = await operator.stub.ListViolations(
        pb.ListViolationsRequest(limit=1000), metadata=operator.metadata(), timeout=5
    )
    return list(page.violations)


async def test_a_report_arrives_at_once_with_its_reporter(
    clients: Any, registry: Any, until: Callable[..., Any]
) -> None:
    async with reporter(registry) as made:
        made.report(violation())

        async def arrived() -> Any:
            return await rows(clients)

        (row,) = await until(arrived)
    assert (row.kind, row.reporter, row.evidence) == ("stale_append", "agent:n1", "of ann")
    assert (row.user.tenant_id, row.user.user_id, row.epoch) == ("acme", "ann", 7)
    assert (row.node_id, row.node_rev) == NODE


async def test_equal_ones_within_a_second_are_one_row_with_a_count(
    clients: Any, registry: Any, until: Callable[..., Any]
) -> None:
    async with reporter(registry) as made:
        made.report(violation())

        async def first() -> Any:
            return await rows(clients)

        assert len(await until(first)) == 1
        for _ in range(40):
            made.report(violation())
        made.report(violation("bob"))
        assert made.waiting == 2

        async def all_of_them() -> Any:
            found = await rows(clients)
            return found if len(found) == 3 else None

        counts = {(r.user.user_id, r.count) for r in await until(all_of_them)}
    assert counts == {("ann", 1), ("ann", 40), ("bob", 1)}


async def test_close_sends_what_waits(clients: Any, registry: Any) -> None:
    async with reporter(registry) as made:
        made.report(violation())
        made.report(violation())
        await made.close()
        made.report(violation("late"))
    assert sum(row.count for row in await rows(clients)) == 2
    await made.close()


async def test_while_the_registry_is_away_nothing_is_lost_nor_waits_for_it(
    clients: Any, registry: Any, until: Callable[..., Any]
) -> None:
    registry.kill()
    async with reporter(registry) as made:
        began = time.monotonic()
        for number in range(300):
            made.report(violation(f"u{number:03}"))
            made.report(violation(f"u{number:03}"))
        assert time.monotonic() - began < 1.0
        await asyncio.to_thread(registry.start)

        async def arrived() -> Any:
            found = await rows(clients)
            return found if len(found) >= 300 else None

        found = await until(arrived)
    assert [row.user.user_id for row in found] == [f"u{n:03}" for n in range(300)]
    assert {row.count for row in found} == {2}


async def test_a_full_queue_drops_the_oldest_refusals_and_says_how_many(
    clients: Any, registry: Any, until: Callable[..., Any]
) -> None:
    registry.kill()
    async with reporter(registry, most_waiting=10) as made:
        made.report(violation("eve", BREACH))
        for number in range(30):
            made.report(violation(f"u{number:02}"))
        assert made.waiting == 10
        await asyncio.to_thread(registry.start)

        async def arrived() -> Any:
            found = await rows(clients)
            return found if len(found) >= 10 else None

        found = await until(arrived)
    assert [row.user.user_id for row in found] == ["eve", *(f"u{n}" for n in range(21, 30))]
    assert found[0].evidence == "of eve (before this, 21 reports were dropped)"


async def test_closing_while_the_registry_is_away_takes_a_second(registry: Any) -> None:
    registry.kill()
    async with reporter(registry) as made:
        made.report(violation())
        began = time.monotonic()
        await made.close()
        assert time.monotonic() - began < 2.0


async def test_what_is_refused_for_good_does_not_hold_up_the_rest(
    clients: Any, registry: Any, until: Callable[..., Any]
) -> None:
    async with reporter(registry) as made:
        made.report(violation("x" * 200))
        await until(lambda: made.waiting == 0)
        made.report(violation())

        async def arrived() -> Any:
            return await rows(clients)

        (row,) = await until(arrived)
    assert row.evidence == "of ann (before this, 1 reports were dropped)"


async def test_each_report_counts_in_the_metrics_of_its_process(registry: Any) -> None:
    metrics = ServiceMetrics(CollectorRegistry())
    async with reporter(registry, metrics=metrics) as made:
        for _ in range(3):
            made.report(violation())
        made.report(violation("eve", BREACH))
    value = metrics.registry.get_sample_value
    assert value("steward_refusals_total", {"kind": "stale_append"}) == 3
    assert value("steward_breaches_total", {"kind": "foreign_event"}) == 1


async def test_what_can_not_be_said_does_not_end_the_reporter(
    clients: Any, registry: Any, until: Callable[..., Any]
) -> None:
    async with reporter(registry) as made:
        made.report(Violation(STALE, "", epoch=Epoch(-1)))
        await until(lambda: made.waiting == 0)
        made.report(violation())

        async def arrived() -> Any:
            return await rows(clients)

        assert len(await until(arrived)) == 1
