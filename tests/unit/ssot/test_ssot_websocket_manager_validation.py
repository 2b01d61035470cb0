"""One user, one manager: who may make one, who gets one, and that no two have anything in common.

Everything that decides is real here: the registry's machine on SQLite, the nodes' hosts,
the log, the agents in their threads (`steward.testing.cluster`), or the source tree itself.
"""

import asyncio
import copy
import pickle
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent_service.core.effects import AnswerAttached, AnswerRefused
from agent_service.core.grants import AUDIT_EVENT, Grant, GrantBook, GrantRefused
from agent_service.core.journal import Sealed
from agent_service.core.manager import Manager
from agent_service.core.policy import AgentPolicy, ManagerPolicy
from steward.cli.main import run_command
from steward.errors import Reason
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, Sequence, StreamId, UserKey
from steward.model.placement import Placement
from steward.testing.cluster import EdgeProbe, InProcessCluster
from steward.testing.waiting import eventually

ROOT = Path(__file__).parents[3]
PACKAGES = ("steward", "registry_service", "agent_service", "auth_service", "edge")
FACADES = ("steward", "steward.agent", "steward.client")

ALICE = UserKey("acme", "alice")
BOB = UserKey("acme", "bob")
CAROL = UserKey("acme", "carol")
OTHER_ALICE = UserKey("globex", "alice")
INCARNATION = NodeIncarnation(NodeId("node-0"), NodeRev(3))
BOUND_S = 2.0

MakeCluster = Callable[..., Any]
FindManagers = Callable[[UserKey], list[Manager]]


# ---- one manager per user


@pytest.mark.asyncio
async def test_singleton_pattern_enforcement_per_user(
    make_cluster: MakeCluster, managers: FindManagers
) -> None:
    """However many ask at once, from edges and nodes, a user has one (node, epoch), one object."""
    cluster: InProcessCluster = await make_cluster(nodes=3)
    edges = [cluster.edge(f"edge-{i}") for i in range(4)]

    placements = await asyncio.gather(*(cluster.resolve(ALICE) for _ in range(100)))
    assert len({(p.incarnation, p.epoch) for p in placements}) == 1
    holder = cluster.node_of(placements[0])
    confirmed = await asyncio.gather(*(n.confirm(ALICE) for n in cluster.nodes.values()))
    assert [p for p in confirmed if p is not None] == [placements[0]]

    attached = await asyncio.gather(*(edge.attach(ALICE) for edge in edges for _ in range(10)))
    assert {type(a.answer) for a in attached} == {AnswerAttached}
    assert {a.epoch for a in attached} == {placements[0].epoch}
    assert len({a.answer.stream_id for a in attached}) == 1
    assert [manager.epoch for manager in managers(ALICE)] == [placements[0].epoch]
    assert [node.host.managers for node in cluster.nodes.values() if node is not holder] == [0, 0]
    assert len(await cluster.ledger("place", ALICE)) == 1

    await edges[0].attach(BOB)
    (of_alice,), (of_bob,) = managers(ALICE), managers(BOB)
    assert of_alice is not of_bob
    assert of_alice.stream_id != of_bob.stream_id


# ---- no way around the registry


def granted(user: UserKey = ALICE, epoch: int = 7) -> tuple[GrantBook, Grant]:
    book = GrantBook(INCARNATION)
    book.learn(Placement(user, Epoch(epoch), INCARNATION.node_id, INCARNATION.node_rev, "a:1"))
    return book, book.take(user, Epoch(epoch))


def sealed() -> Sealed:
    return Sealed(StreamId("s"), Sequence(1), Sequence(1), ())


POLICY = ManagerPolicy((AgentPolicy("echo", "queue"),))


def a_manager() -> Manager:
    return Manager(granted()[1], sealed(), POLICY)


def spend_twice() -> None:
    grant = granted()[1]
    Manager(grant, sealed(), POLICY)
    Manager(grant, sealed(), POLICY)


def make_subclass() -> None:
    type("MyManager", (Manager,), {})


def forge_grant() -> None:
    book, _ = granted()
    Grant(Placement(BOB, Epoch(9), INCARNATION.node_id, INCARNATION.node_rev, "a:1"), book)


WAYS: dict[str, Callable[[], Any]] = {
    "class call without arguments": lambda: Manager(),  # type: ignore[call-arg]
    "class call": lambda: Manager(None, sealed(), POLICY),  # type: ignore[arg-type]
    "class call with a placement": lambda: Manager(
        granted()[1].placement,  # type: ignore[arg-type]
        sealed(),
        POLICY,
    ),
    "a grant that was used": spend_twice,
    "a forged grant": forge_grant,
    "subclass": make_subclass,
    "subclass of the grant": lambda: type("MyGrant", (Grant,), {}),
    "copy": lambda: copy.copy(a_manager()),
    "deepcopy": lambda: copy.deepcopy(a_manager()),
    "copy of a grant": lambda: copy.copy(granted()[1]),
    "pickle": lambda: pickle.dumps(a_manager()),
    "pickle of a grant": lambda: pickle.dumps(granted()[1]),
    "a pickle that was written by hand": lambda: pickle.loads(
        b"\x80\x02cagent_service.core.manager\nManager\n)\x81."
    ),
    "__new__": lambda: Manager.__new__(Manager),
    "__new__ of the grant": lambda: Grant.__new__(Grant),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("way", WAYS)
async def test_direct_instantiation_prevention(
    way: str, make_cluster: MakeCluster, managers: FindManagers
) -> None:
    """No way to a manager but a grant: RuntimeError, audited, counted, kept with evidence."""
    cluster: InProcessCluster = await make_cluster(nodes=1)
    (node,) = cluster.nodes.values()
    heard: list[str] = []
    listening = True
    sys.addaudithook(
        lambda event, args: heard.append(args[0]) if listening and event == AUDIT_EVENT else None
    )

    with pytest.raises(RuntimeError, match=r"from a placement that the registry granted.*Resolve"):
        await asyncio.to_thread(WAYS[way])  # Agents and tools run in other threads too.
    listening = False

    assert len(heard) == 1
    await eventually(lambda: node.refused("direct_construction"), "it is counted")
    (row,) = await eventually(lambda: cluster.ledger("refusal"), "it is in the ledger")
    assert (row.cause, row.node_id, row.node_rev) == ("direct_construction", *node.incarnation)
    assert row.evidence == heard[0]
    assert node.refused("direct_construction") == 1
    # `object.__new__` can't be closed in Python; what it makes can't do anything.
    with pytest.raises(AttributeError):
        object.__new__(Manager).begin(0, 0, 0, "")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("attempt", "kind", "reason"),
    [
        ("without a placement", "unknown_placement", Reason.PLACEMENT_UNKNOWN),
        ("made out to another node", "unknown_placement", Reason.PLACEMENT_UNKNOWN),
        ("forged epoch", "forged_epoch", Reason.EPOCH_STALE),
        ("stale epoch", "stale_epoch", Reason.EPOCH_STALE),
        ("stale epoch beside a live manager", "stale_epoch_command", Reason.EPOCH_STALE),
    ],
)
async def test_factory_bypass_detection(
    attempt: str, kind: str, reason: Reason, make_cluster: MakeCluster
) -> None:
    """A node that should activate without a good placement refuses, and the ledger says so."""
    cluster: InProcessCluster = await make_cluster()
    edge = cluster.edge("edge-0")
    real = await cluster.resolve(ALICE)
    other = next(name for name in cluster.nodes if name != real.node_id)
    at = real.node_id

    def claimed(epoch: int, node: NodeId = real.node_id, user: UserKey = ALICE) -> Placement:
        return Placement(user, Epoch(epoch), node, real.node_rev, real.address)

    live = 0
    match attempt:
        case "without a placement":
            tried = claimed(real.epoch, user=BOB)
        case "made out to another node":
            tried, at = real, other
        case "forged epoch":
            tried = claimed(real.epoch + 5)
        case "stale epoch":
            tried = claimed(real.epoch - 1)
        case _:
            await edge.attach(ALICE)
            tried, live = claimed(real.epoch - 1), 1

    answered = await edge.attach(tried.user, placement=tried, node=at)

    assert isinstance(answered.answer, AnswerRefused)
    assert answered.answer.reason is reason
    assert sum(node.host.managers for node in cluster.nodes.values()) == live
    assert (await cluster.log.describe()).streams == live, "nothing was sealed"
    (row,) = await eventually(lambda: cluster.ledger("refusal"), "it is in the ledger")
    assert (row.cause, row.tenant, row.user, row.epoch) == (kind, *tried.user, tried.epoch)
    assert (row.node_id, row.node_rev) == cluster.nodes[at].incarnation
    assert row.evidence
    assert cluster.nodes[at].refused(kind) == 1
    counted = cluster.registry_metrics.registry.get_sample_value
    assert counted("steward_refusals_total", {"kind": kind}) == 1

    # The real placement was not harmed by the attempt.
    answered = await edge.attach(ALICE)
    assert isinstance(answered.answer, AnswerAttached)


def test_factory_bypass_detection_of_a_second_manager_under_one_placement() -> None:
    """A grant book gives one grant per placement, whatever is asked of it."""
    book, _ = granted()
    with pytest.raises(GrantRefused) as refused:
        book.take(ALICE, Epoch(7))
    assert refused.value.kind == "second_manager"


@pytest.mark.xfail(
    strict=True, raises=SystemExit, reason="violations: a store that `steward violations` lists"
)
def test_factory_bypass_detection_is_listed_for_operators(tmp_path: Path) -> None:
    assert run_command(["violations", "--data", str(tmp_path)]) == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("users", [5, 500])
async def test_concurrent_manager_access_isolation(
    users: int, make_cluster: MakeCluster, managers: FindManagers
) -> None:
    """Many users from many tasks and threads at once: each gets its own, and only one."""
    cluster: InProcessCluster = await make_cluster(nodes=2)
    edge = cluster.edge("edge-0")
    loop = asyncio.get_running_loop()
    names = [UserKey("acme", f"user-{i}") for i in range(users)]

    def from_a_thread(user: UserKey) -> Any:
        return asyncio.run_coroutine_threadsafe(edge.attach(user), loop).result(30)

    with ThreadPoolExecutor(8) as threads:
        crowd = [loop.run_in_executor(threads, from_a_thread, user) for user in names]
        tasks = [edge.attach(user) for user in names]
        attached = await asyncio.gather(*tasks, *crowd)

    streams = defaultdict(set)
    for user, answered in zip([*names, *names], attached, strict=True):
        assert isinstance(answered.answer, AnswerAttached), answered
        streams[user].add((answered.epoch, answered.answer.stream_id))
    assert all(len(seen) == 1 for seen in streams.values())
    assert len({stream for ((_, stream),) in streams.values()}) == users
    assert sum(node.host.managers for node in cluster.nodes.values()) == users
    assert all(node.host.managers for node in cluster.nodes.values())
    assert len(await cluster.ledger("place")) == users
    assert len(managers(names[0])) == len(managers(names[-1])) == 1


@pytest.mark.asyncio
async def test_concurrent_manager_access_isolation_of_100_racers_for_one_user(
    make_cluster: MakeCluster, managers: FindManagers
) -> None:
    cluster: InProcessCluster = await make_cluster(nodes=2)
    racers = [cluster.edge(f"edge-{i}") for i in range(100)]
    loop = asyncio.get_running_loop()

    def from_a_thread(edge: EdgeProbe) -> Any:
        return asyncio.run_coroutine_threadsafe(edge.attach(ALICE), loop).result(30)

    with ThreadPoolExecutor(50) as threads:
        crowd = [loop.run_in_executor(threads, from_a_thread, edge) for edge in racers[:50]]
        attached = await asyncio.gather(*(e.attach(ALICE) for e in racers[50:]), *crowd)

    assert {type(a.answer) for a in attached} == {AnswerAttached}
    assert len({(a.epoch, a.answer.stream_id) for a in attached}) == 1
    assert len(managers(ALICE)) == 1
    assert len(await cluster.ledger("place", ALICE)) == 1
