"""Violations in a real registry process: reported, listed, watched, kept over restarts."""

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from steward.errors import Reason
from steward.rpc.roles import Role
from steward.rpc.status import error_of
from steward.v1 import placement_pb2
from steward.v1 import registry_service_pb2 as pb

pytestmark = pytest.mark.asyncio

WITHIN_S = 15.0
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def user_key(user: str) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id="acme", user_id=user)


async def report(client: Any, *violations: pb.Violation) -> int:
    answer = await client.stub.ReportViolations(
        pb.ReportViolationsRequest(violations=violations), metadata=client.metadata(), timeout=15
    )
    return int(answer.last_number)


async def listed(operator: Any, **request: Any) -> Any:
    return await operator.stub.ListViolations(
        pb.ListViolationsRequest(**request), metadata=operator.metadata(), timeout=5
    )


def refusal(epoch: int = 0, **fields: Any) -> pb.Violation:
    return pb.Violation(
        **{"kind": "stale_append", "user": user_key("ann"), "epoch": epoch, **fields}
    )


class Watch:
    """A watch of violations that is set up; `next` gives them one by one."""

    def __init__(self, operator: Any, after: int) -> None:
        self._call = operator.stub.WatchViolations(
            pb.WatchViolationsRequest(after=after), metadata=operator.metadata()
        )
        self._page: list[Any] = []

    async def set_up(self) -> "Watch":
        async with asyncio.timeout(WITHIN_S):
            first = await self._call.read()
        assert isinstance(first, pb.WatchViolationsResponse) and not first.violations
        return self

    async def next(self) -> Any:
        while not self._page:
            async with asyncio.timeout(WITHIN_S):
                response = await self._call.read()
            assert response is not grpc.aio.EOF
            self._page = list(response.violations)
        return self._page.pop(0)

    def cancel(self) -> None:
        self._call.cancel()


async def test_a_report_is_listed_with_all_that_it_said_and_who_said_it(clients: Any) -> None:
    agent, operator = clients.of(Role.AGENT), clients.of(Role.OPERATOR)
    sent = refusal(
        4,
        node_id="n1",
        node_rev=2,
        evidence="fence 5\nticket=abc.def",
        traceparent=TRACE,
        count=3,
        severity=pb.SEVERITY_BREACH,  # What it is, the table says.
        reporter="edge:somebody-else",
        number=77,
        at_ms=1,
    )
    assert await report(agent, sent) == 1
    assert await report(clients.of(Role.EDGE), pb.Violation(kind="foreign_event")) == 2
    page = await listed(operator)
    first, second = page.violations
    assert first.at_ms > 1_700_000_000_000
    first.at_ms = 0
    assert first == pb.Violation(
        number=1,
        severity=pb.SEVERITY_REFUSAL,
        kind="stale_append",
        user=user_key("ann"),
        epoch=4,
        node_id="n1",
        node_rev=2,
        reporter="agent:agent-test",
        evidence="fence 5 ticket=(secret)",
        traceparent=TRACE,
        count=3,
    )
    assert (second.severity, second.reporter) == (pb.SEVERITY_BREACH, "edge:edge-test")
    assert not second.HasField("user") and second.count == 1
    assert (page.refusals, page.breaches) == (3, 1)
    only = await listed(operator, severity=pb.SEVERITY_BREACH)
    assert [v.number for v in only.violations] == [2]


async def test_a_restart_keeps_them_and_a_watch_goes_on_from_its_number(
    clients: Any, registry: Any
) -> None:
    agent, operator = clients.of(Role.AGENT), clients.of(Role.OPERATOR)
    watch = await Watch(operator, 0).set_up()
    await report(agent, refusal(1), refusal(2))
    assert [(await watch.next()).epoch for _ in range(2)] == [1, 2]
    await report(agent, refusal(3))
    registry.kill()
    await asyncio.to_thread(registry.start)
    page = await listed(operator)
    assert [v.number for v in page.violations] == [1, 2, 3] and page.refusals == 3
    again = await Watch(operator, 2).set_up()
    assert (await again.next()).number == 3
    await report(agent, refusal(4))
    assert (await again.next()).epoch == 4


async def test_a_stopping_registry_ends_its_watches_with_a_reason(
    clients: Any, registry: Any
) -> None:
    watch = await Watch(clients.of(Role.OPERATOR), 0).set_up()
    assert await asyncio.to_thread(registry.stop) == 0
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await watch.next()
    assert error_of(ended.value).reason is Reason.STORE_UNAVAILABLE


async def test_the_oldest_refusals_go_and_breaches_stay(clients: Any, registry: Any) -> None:
    assert registry.stop() == 0
    await asyncio.to_thread(registry.start, **{"kept-violations": "50"})
    agent, operator = clients.of(Role.AGENT), clients.of(Role.OPERATOR)
    await report(agent, pb.Violation(kind="foreign_event"))
    for first in range(0, 200, 100):
        await report(agent, *(refusal(first + n) for n in range(100)))
    page = await listed(operator, limit=1000)
    numbers = [v.number for v in page.violations]
    assert numbers == [1, *range(153, 202)]
    assert (page.refusals, page.breaches) == (200, 1)


async def test_a_slow_watcher_gets_every_row_and_delays_nobody(clients: Any) -> None:
    agent, operator = clients.of(Role.AGENT), clients.of(Role.OPERATOR)
    slow = await Watch(operator, 0).set_up()
    quick = await Watch(operator, 0).set_up()
    evidence = "word " * 800
    total = 0
    for _ in range(10):  # About 10 MB: more than HTTP/2 takes for a reader that does not read.
        rows = [refusal(total + n, evidence=evidence) for n in range(256)]
        total += len(rows)
        assert await report(agent, *rows) == total
    assert [(await quick.next()).number for _ in range(total)] == list(range(1, total + 1))
    assert [(await slow.next()).number for _ in range(total)] == list(range(1, total + 1))


async def test_watches_are_bounded_and_a_watch_that_ends_makes_room(
    clients: Any, until: Callable[..., Any]
) -> None:
    operator = clients.of(Role.OPERATOR)
    open_ = [await Watch(operator, 0).set_up() for _ in range(64)]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await Watch(operator, 0).set_up()
    assert error_of(refused.value).reason is Reason.NO_CAPACITY
    open_[0].cancel()

    async def room() -> bool:
        try:
            await Watch(operator, 0).set_up()
        except grpc.aio.AioRpcError:
            return False
        return True

    assert await until(room)


@pytest.mark.parametrize("role", [Role.AGENT, Role.EDGE, Role.AUTH, Role.LOG, Role.REGISTRY])
async def test_only_operators_read_records_or_command(clients: Any, role: Role) -> None:
    client = clients.of(role)
    stub, metadata = client.stub, client.metadata()
    user = user_key("ann")
    calls = [
        stub.ListViolations(pb.ListViolationsRequest(), metadata=metadata),
        stub.ReadLedger(pb.ReadLedgerRequest(), metadata=metadata),
        stub.DrainNode(pb.DrainNodeRequest(node_id="n1"), metadata=metadata),
        stub.FenceNode(pb.FenceNodeRequest(node_id="n1"), metadata=metadata),
        stub.MoveUser(pb.MoveUserRequest(user=user), metadata=metadata),
        stub.EvictUser(pb.EvictUserRequest(user=user), metadata=metadata),
        stub.WatchViolations(pb.WatchViolationsRequest(), metadata=metadata).read(),
        stub.WatchPlacements(pb.WatchPlacementsRequest(), metadata=metadata).read(),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert error_of(refused.value).reason is Reason.PERMISSION_DENIED


async def test_a_registry_and_a_stranger_report_nothing(clients: Any) -> None:
    stranger = clients.of(Role.REGISTRY)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await report(stranger, refusal())
    assert error_of(refused.value).reason is Reason.PERMISSION_DENIED
    assert not (await listed(clients.of(Role.OPERATOR))).violations


@pytest.mark.parametrize(
    "bad",
    [
        pb.Violation(kind="no_such_kind"),
        pb.Violation(kind=""),
        refusal(user=placement_pb2.UserKey(tenant_id="acme", user_id="x" * 129)),
        refusal(user=placement_pb2.UserKey(tenant_id="", user_id="ann")),
        refusal(user=placement_pb2.UserKey(tenant_id="acme", user_id="a\nb")),
        refusal(1 << 53),
        refusal(node_id="n\x00"),
        refusal(traceparent="x" * 65),
    ],
)
async def test_a_malformed_report_is_refused_as_a_whole(clients: Any, bad: pb.Violation) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await report(clients.of(Role.AGENT), refusal(1), bad)
    assert error_of(refused.value).reason is Reason.PROTOCOL_VIOLATION
    assert not (await listed(clients.of(Role.OPERATOR))).violations


async def test_what_no_list_can_give_is_refused(clients: Any) -> None:
    operator = clients.of(Role.OPERATOR)
    for request in ({"limit": 1001}, {"after": 1 << 63}, {"severity": 9}):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await listed(operator, **request)
        assert error_of(refused.value).reason is Reason.PROTOCOL_VIOLATION
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await Watch(operator, 5).set_up()
    assert error_of(refused.value).reason is Reason.POSITION_COMPACTED


async def test_a_process_of_another_cluster_is_refused_and_on_record(
    clients: Any, until: Callable[..., Any]
) -> None:
    operator = clients.of(Role.OPERATOR)
    edge = clients.edge("e1")
    await edge.join(cluster="elsewhere")
    await edge.open.end()
    for _ in range(3):  # It comes again and again: one row.
        session = await clients.node("n1").hello(cluster="elsewhere", address="10.0.0.1:7")
        await session.end()
    other = clients.of(Role.AUTH, cluster="faraway")
    with pytest.raises(grpc.aio.AioRpcError):
        await report(other, refusal())

    async def recorded() -> Any:
        rows = (await listed(operator)).violations
        return rows if len(rows) == 3 else None

    rows = await until(recorded)
    assert {(v.kind, v.severity, v.reporter) for v in rows} == {
        ("wrong_cluster", pb.SEVERITY_REFUSAL, "registry:door")
    }
    assert sorted(v.evidence for v in rows) == [
        "agent:n1 at 10.0.0.1:7 is of cluster 'elsewhere', this one is 'test'",
        "auth:auth-test is of cluster 'faraway', this one is 'test'",
        "edge:e1 is of cluster 'elsewhere', this one is 'test'",
    ]


async def test_what_the_registry_itself_refuses_is_a_violation(
    clients: Any, registry: Any, until: Callable[..., Any]
) -> None:
    node = clients.node("n1")
    await node.join()
    thief = clients.node("n1")
    session = await thief.hello()
    await session.end()
    operator = clients.of(Role.OPERATOR)

    async def recorded() -> Any:
        return (await listed(operator)).violations

    (row,) = await until(recorded)
    assert (row.kind, row.node_id, row.node_rev) == ("node_id_in_use", "n1", node.node_rev)
    assert row.reporter.startswith("registry:")
    assert (
        'steward_registry_violations_total{kind="node_id_in_use",severity="refusal"} 1.0'
        in registry.ops("/metrics")
    )


async def test_a_database_of_before_gets_its_violations(clients: Any, registry: Any) -> None:
    assert registry.stop() == 0
    with sqlite3.connect(registry.data / "registry.db") as database:
        database.execute("DROP TABLE violation")
        database.execute("DROP TABLE violation_total")
    database.close()
    await asyncio.to_thread(registry.start)
    assert await report(clients.of(Role.LOG), refusal()) >= 1
    assert (await listed(clients.of(Role.OPERATOR))).refusals == 1
