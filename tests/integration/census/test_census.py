"""What a census finds, each planted for real; and that motion is no finding."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from agent_service.core.journal import Seal
from registry_service.census.ledger import Checked, check_ledger
from registry_service.census.rounds import CensusConfig
from registry_service.core.census import Sighting
from steward.errors import StewardError
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.model.placement import Placement
from steward.model.violations import KINDS, Severity, ViolationKind
from steward.testing.cluster import InProcessCluster
from steward.testing.planted import PLANTS, other_node
from steward.testing.waiting import eventually

pytestmark = pytest.mark.asyncio
MakeCluster = Callable[..., Any]

ALICE = UserKey("acme", "alice")
USERS = [UserKey("acme", f"user-{number}") for number in range(30)]


def found(cluster: InProcessCluster) -> set[tuple[ViolationKind, UserKey]]:
    return {(each.kind, each.user) for each in cluster.census.confirmation.confirmed}


async def with_everybody(cluster: InProcessCluster) -> Any:
    edge = cluster.edge("edge-0")
    await asyncio.gather(*(edge.attach(user) for user in [ALICE, *USERS]))
    return edge


def metric(cluster: InProcessCluster, name: str, **labels: str) -> float:
    value = cluster.registry_metrics.registry.get_sample_value(name, labels)
    assert value is not None
    return value


async def test_a_healthy_cluster_has_no_findings_and_everybody_is_counted(
    make_cluster: MakeCluster,
) -> None:
    cluster: InProcessCluster = await make_cluster(nodes=3)
    await with_everybody(cluster)
    seen = await cluster.census.settle()
    assert seen.complete, seen.missing
    assert (seen.nodes, seen.edges) == (3, 1)
    assert (seen.placements, seen.managers, seen.attachments) == (31, 31, 31)
    assert seen.fences == 31
    assert found(cluster) == set()
    assert metric(cluster, "steward_registry_census_age_seconds") < 1


async def test_a_user_who_is_placed_and_never_asked_for_is_no_finding(
    make_cluster: MakeCluster,
) -> None:
    cluster: InProcessCluster = await make_cluster()
    await cluster.resolve(ALICE)
    seen = await cluster.census.settle()
    assert (seen.placements, seen.managers) == (1, 0)
    assert (seen.complete, found(cluster)) == (True, set())


@pytest.mark.parametrize("plant", PLANTS)
async def test_what_is_planted_is_found_once_kept_and_counted(
    plant: str, make_cluster: MakeCluster
) -> None:
    cluster: InProcessCluster = await make_cluster()
    edge = await with_everybody(cluster)
    await cluster.census.settle()
    assert found(cluster) == set()

    kinds = await PLANTS[plant](cluster, edge, ALICE)
    await cluster.census.take()
    assert found(cluster) == set(), "one look is no finding"
    seen = await cluster.census.settle()

    assert seen.complete, seen.missing
    assert found(cluster) == {(each, ALICE) for each in kinds}
    rows = [
        row
        for row in await cluster.violations()
        if KINDS[ViolationKind(row.kind)].severity is Severity.BREACH
    ]
    assert {(row.kind, row.user) for row in rows} == {(each.value, "alice") for each in kinds}
    assert all("under" in row.evidence for row in rows)
    for kind in kinds:
        assert metric(cluster, "steward_registry_census_findings", kind=kind.value) == 1
        assert metric(cluster, "steward_breaches_total", kind=kind.value) == 1
    await cluster.census.take()
    for kind in kinds:
        assert metric(cluster, "steward_breaches_total", kind=kind.value) == 1, "counted once"


async def test_what_is_mended_is_a_finding_no_more(make_cluster: MakeCluster) -> None:
    cluster: InProcessCluster = await make_cluster()
    edge = await with_everybody(cluster)
    await PLANTS["unreachable"](cluster, edge, ALICE)
    await cluster.census.settle()
    assert found(cluster) == {(ViolationKind.UNREACHABLE_USER, ALICE)}
    # What docs/violations.md says is to be done.
    placed = await cluster.move(ALICE)
    await edge.attach(ALICE, placement=placed)
    await cluster.census.settle()
    assert found(cluster) == set()
    assert metric(cluster, "steward_registry_census_findings", kind="unreachable_user") == 0


async def test_a_node_that_does_not_answer_is_missed_and_the_age_grows(
    make_cluster: MakeCluster,
) -> None:
    cluster: InProcessCluster = await make_cluster(
        census=CensusConfig(interval_ms=0, answer_ms=50, patience_ms=0)
    )
    await with_everybody(cluster)
    assert (await cluster.census.take()).complete
    node = next(iter(cluster.nodes.values()))
    node._counting.cancel()
    seen = await cluster.census.take()
    assert not seen.complete
    assert seen.missing == [f"{node.name} did not answer"]
    before = metric(cluster, "steward_registry_census_age_seconds")
    await asyncio.sleep(0.05)
    assert metric(cluster, "steward_registry_census_age_seconds") > before

    cluster.census.nodes.closed(node.name, node._peer)
    assert (await cluster.census.take()).missing == [f"{node.name} has no session"]


async def test_a_round_that_fails_by_an_error_of_the_registry_is_not_the_last_one(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster: InProcessCluster = await make_cluster(census=CensusConfig(interval_ms=20))
    running = cluster._counting
    assert running is not None
    failures = 0

    async def stumble() -> None:
        nonlocal failures
        failures += 1
        raise KeyError("an error of this process")

    with monkeypatch.context() as broken:
        broken.setattr(cluster.census._follower, "check_page", stumble)
        await eventually(lambda: failures, "a round that fails")
    since = cluster.census.complete_ms
    await eventually(
        lambda: running.done() or cluster.census.complete_ms != since, "a whole round after it"
    )
    assert not running.done()
    assert "an error of this process" in caplog.text


@pytest.mark.parametrize("seed", range(3))
async def test_moves_failovers_and_drains_are_no_findings(
    seed: int, make_cluster: MakeCluster
) -> None:
    """Censuses without a pause, and an eighth of the usual patience, while everything moves."""
    hasty = CensusConfig(interval_ms=0, answer_ms=2_000, least_ms=250, ties_ms=500)
    cluster: InProcessCluster = await make_cluster(nodes=3, census=hasty)
    luck = random.Random(seed)
    edge = await with_everybody(cluster)
    over = False
    sightings: list[Sighting] = []
    rounds = complete = 0

    async def count() -> None:
        nonlocal rounds, complete
        while not over:
            seen = await cluster.census.take()
            rounds += 1
            complete += seen.complete
            sightings.extend(cluster.census.confirmation.confirmed)
            await asyncio.sleep(0.01)

    async def reattach(user: UserKey) -> None:
        for _ in range(50):
            try:
                await edge.attach(user)
                return
            except (StewardError, KeyError):
                await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    moved = failed = 0
    number = 0
    while number < 25 or rounds < 25:
        number += 1
        match luck.choice(("move", "move", "evict", "fail")):
            case "move":
                some = luck.sample(USERS, 10)
                answers = await asyncio.gather(
                    *(cluster.move(user) for user in some), return_exceptions=True
                )
                moved += sum(isinstance(answer, Placement) for answer in answers)
            case "evict":
                await cluster.evict(luck.choice(USERS))
            case "fail":
                victim = luck.choice(list(cluster.nodes.values()))
                await cluster.add_node(f"node-{number + 10}")
                await cluster.fence(victim)
                victim.host.fence("reaped")
                del cluster.nodes[victim.name]
                await victim.stop()
                for user, at in list(edge.attached.items()):
                    if at.incarnation == victim.incarnation:
                        del edge.attached[user]
                failed += 1
        await asyncio.gather(*(reattach(u) for u in USERS if u not in edge.attached))
    over = True
    await counting
    assert moved > 20 and failed >= 1 and complete > 20, (moved, failed, rounds, complete)
    assert sightings == []
    seen = await cluster.census.settle()
    assert seen.complete, seen.missing
    assert found(cluster) == set()


async def checked(cluster: InProcessCluster) -> Checked:
    said = [each async for each in check_ledger(cluster.store, cluster.census.read_fences)]
    return said[-1]


async def test_ledger_and_log_agree_over_moves_and_releases(make_cluster: MakeCluster) -> None:
    cluster: InProcessCluster = await make_cluster()
    edge = await with_everybody(cluster)
    for user in USERS[:10]:
        placed = await cluster.move(user)
        await edge.attach(user, placement=placed)
    for node in cluster.nodes.values():
        node.host.edge_closed(edge.edge_id)
        node.host.passivate_after(0)
    await eventually(lambda: cluster.ledger("release"), "somebody is passivated")
    result = await checked(cluster)
    assert result.rows >= 44
    assert (result.fences, result.found, result.not_kept) == (31, 0, 0)


async def test_a_fence_that_the_ledger_never_granted_is_found(make_cluster: MakeCluster) -> None:
    cluster: InProcessCluster = await make_cluster()
    edge = await with_everybody(cluster)
    epoch = Epoch(edge.placements[ALICE].epoch + 500)
    await cluster.log.seal(Seal(ALICE, epoch, "other"))
    result = await checked(cluster)
    assert result.found == 1
    (row,) = result.disagreements
    assert (row.kind, row.user.user_id, row.epoch) == ("fence_above_registry", "alice", epoch)


async def test_a_log_that_forgot_a_manager_of_the_ledger_is_found(
    make_cluster: MakeCluster,
) -> None:
    cluster: InProcessCluster = await make_cluster()
    edge = await with_everybody(cluster)
    epoch = edge.placements[ALICE].epoch
    host = cluster.node_of(edge.placements[ALICE]).host
    host.edge_closed(edge.edge_id)
    host.passivate_after(0)
    await eventually(lambda: cluster.ledger("release", ALICE), "she is passivated")
    assert (await checked(cluster)).found == 0
    del cluster.log.state._streams[ALICE]  # type: ignore[attr-defined]
    result = await checked(cluster)
    assert [(r.kind, r.user.user_id, r.epoch) for r in result.disagreements] == [
        ("unsealed_manager", "alice", epoch)
    ]


async def test_a_row_that_was_taken_out_of_the_ledger_is_found(make_cluster: MakeCluster) -> None:
    cluster: InProcessCluster = await make_cluster()
    await with_everybody(cluster)
    connection = cluster.store._connection  # type: ignore[attr-defined]
    await cluster.store._call(  # type: ignore[attr-defined]
        lambda: connection.execute("DELETE FROM ledger WHERE user = 'alice' AND kind = 'place'")
    )
    result = await checked(cluster)
    assert [(r.kind, r.user.user_id) for r in result.disagreements] == [
        ("fence_above_registry", "alice")
    ]


async def test_a_placement_that_was_changed_behind_the_registrys_back_is_found(
    make_cluster: MakeCluster,
) -> None:
    cluster: InProcessCluster = await make_cluster()
    edge = await with_everybody(cluster)
    await cluster.census.take()
    other = other_node(cluster, edge.placements[ALICE])
    connection = cluster.store._connection  # type: ignore[attr-defined]
    node: NodeIncarnation = other.incarnation
    await cluster.store._call(  # type: ignore[attr-defined]
        lambda: connection.execute(
            "UPDATE placement SET node_id = ?, node_rev = ? WHERE user = 'alice'", tuple(node)
        )
    )
    await cluster.census.settle()
    assert (ViolationKind.STALE_MANAGER, ALICE) in found(cluster)
    assert NodeIncarnation(NodeId("x"), NodeRev(1)) != node
