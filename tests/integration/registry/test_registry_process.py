"""The registry as a real process over real gRPC: join, resolve, failover, restart, refusals."""

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from steward.errors import Reason
from steward.rpc.roles import Role
from steward.rpc.status import error_of
from steward.v1 import placement_pb2, registry_service_pb2

pytestmark = pytest.mark.asyncio


def user_key(user: str) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id="acme", user_id=user)


def resolve_request(*users: str) -> registry_service_pb2.ResolveManagersRequest:
    queries = [registry_service_pb2.UserQuery(user=user_key(user)) for user in users]
    return registry_service_pb2.ResolveManagersRequest(users=queries)


def where(results: list[Any]) -> list[tuple[str, int]]:
    return [(result.placement.node_id, result.placement.epoch) for result in results]


async def two_nodes(clients: Any) -> tuple[Any, Any]:
    first, second = clients.node("n1"), clients.node("n2")
    await first.join()
    await second.join()
    return first, second


async def two_edges(clients: Any) -> tuple[Any, Any]:
    first, second = clients.edge("e1"), clients.edge("e2")
    await first.connect()
    await second.connect()
    return first, second


async def test_two_edges_see_one_placement_and_its_node_is_told(clients: Any) -> None:
    nodes = await two_nodes(clients)
    first, second = await two_edges(clients)
    users = [f"u{number}" for number in range(20)]
    answers = await asyncio.gather(first.resolve(*users), second.resolve(*users))
    assert where(answers[0]) == where(answers[1])
    epochs = [epoch for _, epoch in where(answers[0])]
    assert len(set(epochs)) == len(users)
    by_node = {node.node_id: node for node in nodes}
    assert {node_id for node_id, _ in where(answers[0])} == {"n1", "n2"}
    for node_id, node in by_node.items():
        expected = {
            (result.user.user_id, result.placement.epoch)
            for result in answers[0]
            if result.placement.node_id == node_id
        }
        granted: set[tuple[str, int]] = set()
        while granted != expected:
            push = await node.open.expect("granted")
            granted |= {(p.user.user_id, p.epoch) for p in push.placements}
            assert granted <= expected
        placement = next(r.placement for r in answers[0] if r.placement.node_id == node_id)
        assert (placement.node_rev, placement.address) == (node.node_rev, node.listen())


async def test_a_node_that_dies_is_fenced_and_its_users_come_up_under_higher_epochs(
    clients: Any, registry: Any
) -> None:
    first, second = await two_nodes(clients)
    edges = await two_edges(clients)
    users = [f"u{number}" for number in range(12)]
    before = await edges[0].resolve(*users)
    lost = {r.user.user_id for r in before if r.placement.node_id == "n1"}
    began = time.monotonic()
    await first.die()
    for edge in edges:
        fenced = await edge.open.expect("node_fenced")
        assert (fenced.node_id, fenced.node_rev) == ("n1", first.node_rev)
    assert time.monotonic() - began < 2.0
    after = await edges[1].resolve(*users)
    for old, new in zip(before, after, strict=True):
        assert new.placement.node_id == "n2"
        if new.user.user_id in lost:
            assert new.placement.epoch > old.placement.epoch
        else:
            assert new.placement == old.placement
    metrics = registry.ops("/metrics")
    assert 'steward_registry_fences_total{evidence="B"} 1.0' in metrics
    assert 'steward_registry_nodes{state="up"} 1.0' in metrics
    assert f"steward_registry_placements {len(users)}.0" in metrics
    assert second.open.error is None


async def test_a_broken_stream_alone_fences_nobody(clients: Any) -> None:
    node = clients.node("n1")
    await node.join()
    (edge, _) = await two_edges(clients)
    before = await edge.resolve("ann")
    node_rev = node.node_rev
    await node.stop_beating()
    await node.open.close()
    # It still listens, and comes back with its nonce: the same incarnation.
    await node.join()
    assert node.node_rev == node_rev
    assert where(await edge.resolve("ann")) == where(before)


async def test_a_silent_node_is_fenced_when_its_lease_is_over(
    clients: Any, registry: Any, until: Callable[..., Any]
) -> None:
    registry.stop()
    await asyncio.to_thread(registry.start, **{"ttl-ms": "1500"})
    node = clients.node("n1")
    await node.join()
    edge = clients.edge("e1")
    await edge.connect()
    await node.stop_beating()
    fenced = await node.open.expect("fenced")
    assert fenced.cause == "lease over"
    assert (await edge.open.expect("node_fenced")).node_rev == node.node_rev
    assert 'steward_registry_fences_total{evidence="D"} 1.0' in registry.ops("/metrics")


async def test_a_registry_that_was_paused_fences_nobody_for_what_it_missed(
    clients: Any, registry: Any
) -> None:
    registry.stop()
    await asyncio.to_thread(registry.start, **{"ttl-ms": "1500"})
    node = clients.node("n1")
    await node.join()
    edge = clients.edge("e1")
    await edge.connect()
    before = await edge.resolve("ann")
    await node.open.expect("granted")
    registry.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(3.0)  # Twice the lease: the time itself is what is tested.
    registry.process.send_signal(signal.SIGCONT)
    renewed = 0
    while renewed < 20:
        await node.open.next("renewed")
        renewed += 1
    assert where(await edge.resolve("ann")) == where(before)
    fences = [
        line
        for line in registry.ops("/metrics").splitlines()
        if line.startswith("steward_registry_fences_total{")
    ]
    assert len(fences) == 5
    assert all(line.endswith(" 0.0") for line in fences)


async def test_a_fenced_process_that_comes_back_is_told_and_refused(clients: Any) -> None:
    node = clients.node("n1")
    await node.join()
    edge = clients.edge("e1")
    await edge.connect()
    await node.stop_beating()
    node.listener.close()
    await node.open.close()
    await edge.open.expect("node_fenced")
    session = await node.hello()
    fenced = await session.expect("fenced")
    assert fenced.node_rev == node.node_rev
    await session.end()
    assert session.error is not None
    assert error_of(session.error).reason is Reason.LEASE_EXPIRED


async def test_a_second_process_under_the_name_of_a_living_node_is_refused(
    clients: Any, until: Callable[..., Any]
) -> None:
    node = clients.node("n1")
    await node.join()
    twin = clients.node("n1")
    session = await twin.hello()
    await session.end()
    assert session.error is not None
    assert session.error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert error_of(session.error).reason is Reason.NODE_ID_IN_USE
    assert not node.open.ended.is_set()


async def test_proof_of_death_fences_at_once_although_the_stream_is_open(clients: Any) -> None:
    node = clients.node("n1")
    await node.join()
    operator = clients.of(Role.OPERATOR)
    report = registry_service_pb2.ReportDeathRequest(node_id="n1", pid=1, evidence="exit 137")
    wrong = await operator.stub.ReportDeath(report, metadata=operator.metadata())
    assert not wrong.fenced
    report.pid = 4711
    right = await operator.stub.ReportDeath(report, metadata=operator.metadata())
    assert right.fenced
    fenced = await node.open.expect("fenced")
    assert fenced.cause == "process ended"


async def test_confirm_and_release_compare_what_the_registry_granted(clients: Any) -> None:
    node = clients.node("n1")
    await node.join()
    edge = clients.edge("e1")
    await edge.connect()
    ((_, epoch),) = where(await edge.resolve("ann"))
    await node.open.expect("granted")
    request = registry_service_pb2.HoldNodeSessionRequest
    confirm = registry_service_pb2.ConfirmPlacements(
        request_id=7, users=[user_key("ann"), user_key("nobody")]
    )
    await node.open.send(request(confirm=confirm))
    confirmed = await node.open.expect("confirmed")
    assert confirmed.request_id == 7
    assert [(p.user.user_id, p.epoch) for p in confirmed.placements] == [("ann", epoch)]
    for tried, deleted in ((epoch - 1, 0), (epoch, 1), (epoch, 0)):
        item = registry_service_pb2.ReleasedPlacement(
            user=user_key("ann"), epoch=tried, cause="idle"
        )
        release = registry_service_pb2.ReleasePlacements(request_id=8, placements=[item])
        await node.open.send(request(release=release))
        assert (await node.open.expect("released")).deleted == deleted
    ((_, again),) = where(await edge.resolve("ann"))
    assert again > epoch


async def test_a_draining_node_gets_nobody_new(clients: Any, until: Callable[..., Any]) -> None:
    first, _ = await two_nodes(clients)
    drain = registry_service_pb2.AnnounceDrain()
    await first.open.send(registry_service_pb2.HoldNodeSessionRequest(drain=drain))
    operator = clients.of(Role.OPERATOR)

    async def draining() -> list[str]:
        described = await operator.stub.DescribeCluster(
            registry_service_pb2.DescribeClusterRequest(), metadata=operator.metadata()
        )
        assert described.cluster == "test"
        return [node.node_id for node in described.nodes if node.draining]

    assert await until(draining) == ["n1"]
    answer = await operator.stub.ResolveManagers(
        resolve_request(*(f"u{n}" for n in range(10))), metadata=operator.metadata()
    )
    assert {result.placement.node_id for result in answer.results} == {"n2"}


async def test_without_a_node_a_resolve_waits_and_is_then_refused_for_each_user(
    clients: Any,
) -> None:
    edge = clients.edge("e1")
    await edge.connect()
    began = time.monotonic()
    results = await edge.resolve("ann", "bob")
    assert 1.9 < time.monotonic() - began < 4.0
    assert [result.refusal.reason for result in results] == ["NO_CAPACITY"] * 2
    assert all(result.refusal.retry_after_ms > 0 for result in results)
    waiting = asyncio.create_task(edge.resolve("ann"))
    node = clients.node("n1")
    await node.join()
    assert where(await waiting)[0][0] == "n1"


async def test_a_restarted_registry_keeps_placements_and_hands_out_higher_epochs(
    clients: Any, registry: Any, until: Callable[..., Any]
) -> None:
    first, second = await two_nodes(clients)
    edge = clients.edge("e1")
    await edge.connect()
    users = [f"u{number}" for number in range(8)]
    before = await edge.resolve(*users)
    highest = max(epoch for _, epoch in where(before))
    registry.kill()
    await asyncio.gather(edge.open.end(), first.open.end(), second.open.end())
    # One node died with it: evidence B acts in the grace as well.
    await second.die()
    await asyncio.to_thread(registry.start)
    node_rev = first.node_rev
    await first.join()
    assert first.node_rev == node_rev
    fence = 'steward_registry_fences_total{evidence="B"} 1.0'
    assert await until(lambda: fence in registry.ops("/metrics"))
    await edge.connect()
    after = await edge.resolve(*users, "new")
    for old, new in zip(before, after, strict=False):
        if old.placement.node_id == "n1":
            assert new.placement == old.placement
        else:
            assert new.placement.epoch > highest
    assert after[-1].placement.epoch > highest
    assert {node for node, _ in where(after)} == {"n1"}


async def test_a_second_process_on_the_same_data_is_refused_with_exit_code_2(
    registry: Any,
) -> None:
    second = registry.spawn(**{"grpc-port": "0", "ops-port": "0"})
    _, stderr = await asyncio.to_thread(second.communicate, None, 15)
    assert second.returncode == 2
    assert stderr.count("\n") == 1
    assert "another registry process uses it" in stderr
    assert registry.ready()


async def test_a_stopped_registry_ends_its_streams_and_exits_with_0(
    clients: Any, registry: Any
) -> None:
    node = clients.node("n1")
    await node.join()
    edge = clients.edge("e1")
    await edge.connect()
    began = time.monotonic()
    assert await asyncio.to_thread(registry.stop) == 0
    assert time.monotonic() - began < 5.0
    await asyncio.gather(node.open.end(), edge.open.end())
    # Its end was no evidence against anybody.
    await asyncio.to_thread(registry.start)
    node_rev = node.node_rev
    await node.join()
    assert node.node_rev == node_rev


async def test_metrics_tell_what_the_registry_did(
    clients: Any, registry: Any, until: Callable[..., Any]
) -> None:
    node = clients.node("n1")
    await node.join()
    edge = clients.edge("e1")
    await edge.connect()
    await edge.resolve("ann", "bob")
    await edge.resolve("ann")
    refusal = registry_service_pb2.Violation(
        kind="stale_append", user=user_key("ann"), epoch=1, evidence="fence 2"
    )
    await node.stub.ReportViolations(
        registry_service_pb2.ReportViolationsRequest(violations=[refusal]),
        metadata=node.metadata(),
        timeout=5,
    )
    wanted = [
        'steward_registry_resolves_total{result="placed"} 2.0',
        'steward_registry_resolves_total{result="cached"} 1.0',
        'steward_registry_violations_total{kind="stale_append",severity="refusal"} 1.0',
        'steward_registry_nodes{state="up"} 1.0',
        "steward_registry_edges 1.0",
        "steward_registry_placements 2.0",
        "steward_registry_resolve_seconds_count 2.0",
    ]

    def seen() -> bool:
        metrics = registry.ops("/metrics")
        return all(line in metrics for line in wanted)

    assert await until(seen)
    found = await clients.of(Role.OPERATOR).stub.FindPlacement(
        registry_service_pb2.FindPlacementRequest(user=user_key("ann")),
        metadata=clients.of(Role.OPERATOR).metadata(),
    )
    assert found.node_alive and found.placement.node_id == "n1"
