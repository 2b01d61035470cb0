"""One user, one manager: who may make one, who gets one, and that no two have anything in common.

Everything that decides is real here: the registry's machine on SQLite, the nodes' hosts,
the log, the agents in their threads (`steward.testing.cluster`), or the source tree itself.
The file is long because its ten tests, and that they are together, were given.
"""

import ast
import asyncio
import contextlib
import copy
import gc
import logging
import os
import pickle
import random
import sqlite3
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from enum import Enum
from pathlib import Path
from typing import Any

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import CollectorRegistry, generate_latest

from agent_service.core.effects import AnswerAccepted, AnswerAttached, AnswerRefused
from agent_service.core.grants import AUDIT_EVENT, Grant, GrantBook, GrantRefused
from agent_service.core.journal import Sealed
from agent_service.core.manager import Manager
from agent_service.core.policy import AgentPolicy, ManagerPolicy
from agent_service.log.port import ReadRange
from registry_service.census.rounds import CensusConfig
from registry_service.core.config import RegistryConfig
from registry_service.server import ALLOWED, RegistryServicer
from steward.cli.cluster_file import CLUSTER_NAME, ClusterFile, ProcessEntry, write_cluster
from steward.cli.main import run_command
from steward.cli.report.source import (
    PACKAGES,
    ROLES,
    Trees,
    import_paths,
    read_trees,
    roles_of_a_manager,
    several,
)
from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, Sequence, StreamId, UserKey
from steward.model.placement import Placement
from steward.model.verbs import EventType
from steward.rpc.factory import make_channel, make_server
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials, RoleVerifier
from steward.telemetry.catalog import RegistryMetrics
from steward.telemetry.logs import JsonLines
from steward.telemetry.tracing import FinishedSpan, Tracing
from steward.testing.cluster import EdgeProbe, InProcessCluster
from steward.testing.ownership import Disagreement, LiveManager, findings
from steward.testing.planted import PLANTS
from steward.testing.waiting import eventually
from steward.v1 import placement_pb2, registry_service_pb2, registry_service_pb2_grpc

ROOT = Path(__file__).parents[3]

ALICE = UserKey("acme", "alice")
BOB = UserKey("acme", "bob")
CAROL = UserKey("acme", "carol")
OTHER_ALICE = UserKey("globex", "alice")
INCARNATION = NodeIncarnation(NodeId("node-0"), NodeRev(3))
BOUND_S = 2.0

MakeCluster = Callable[..., Any]
FindManagers = Callable[[UserKey], list[Manager]]


class CommandUnknown(Exception):
    """The command line has no such command."""


def steward(command: str, data: Path, capsys: pytest.CaptureFixture[str], *words: str) -> int:
    """Run a command of `steward`; its exit code. Raises CommandUnknown."""
    try:
        return run_command([command, "--data", str(data), *words])
    except SystemExit as refused:
        if refused.code == 2 and f"invalid choice: '{command}'" in capsys.readouterr().err:
            raise CommandUnknown(command) from None
        raise


# ---- one manager per user


@pytest.mark.asyncio
async def test_singleton_pattern_enforcement_per_user(
    make_cluster: MakeCluster, managers: FindManagers
) -> None:
    """However many ask at once, from edges and nodes, a user has one (node, epoch), one object."""
    quick = RegistryConfig(ttl_ms=600_000, resolve_wait_ms=200)
    cluster: InProcessCluster = await make_cluster(nodes=3, config=quick)
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

    # Whoever does not believe it can't get another while its node lives: the store says so.
    with pytest.raises(StewardError) as refused:
        await cluster.resolve(ALICE, Epoch(placements[0].epoch + 1))
    assert refused.value.reason is Reason.MANAGER_UNAVAILABLE
    assert await cluster.resolve(ALICE) == placements[0]
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
    (row,) = await eventually(cluster.violations, "it is on record")
    assert (row.kind, row.node_id, row.node_rev) == ("direct_construction", *node.incarnation)
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
    """A node that should activate without a good placement refuses, and that is on record."""
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
            cluster.nodes[other].host.granted([real])  # Even if it was told so by mistake.
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
    (row,) = await eventually(cluster.violations, "it is on record")
    assert (row.kind, row.tenant, row.user, row.epoch) == (kind, *tried.user, tried.epoch)
    assert (row.node_id, row.node_rev) == cluster.nodes[at].incarnation
    assert row.evidence
    assert cluster.nodes[at].refused(kind) == 1
    counted = cluster.registry_metrics.registry.get_sample_value
    labels = {"severity": "refusal", "kind": kind}
    assert counted("steward_registry_violations_total", labels) == 1

    # The real placement was not harmed by the attempt.
    answered = await edge.attach(ALICE)
    assert isinstance(answered.answer, AnswerAttached)


def test_factory_bypass_detection_of_a_second_manager_under_one_placement() -> None:
    """A grant book gives one grant per placement, whatever is asked of it."""
    book, _ = granted()
    with pytest.raises(GrantRefused) as refused:
        book.take(ALICE, Epoch(7))
    assert refused.value.kind == "second_manager"


@pytest.mark.asyncio
async def test_factory_bypass_detection_is_listed_for_operators(
    make_cluster: MakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`steward violations` shows the cheat and where it was refused; a breach makes it fail."""
    cluster: InProcessCluster = await make_cluster()
    real = await cluster.resolve(ALICE)
    forged = Placement(ALICE, Epoch(real.epoch + 5), *real.incarnation, real.address)
    await cluster.edge("edge-0").attach(ALICE, placement=forged, node=real.node_id)
    await eventually(cluster.violations, "it is on record")
    key = load_or_create_key(tmp_path, CONTROL_KEY)
    async with registry_door(cluster, key, CLUSTER_NAME) as (stub, metadata):
        registry = ProcessEntry("registry", "registry", os.getpid(), stub.address, None, None)
        write_cluster(tmp_path, ClusterFile(os.getpid(), "", (registry,)))
        assert await asyncio.to_thread(steward, "violations", tmp_path, capsys) == 0
        shown = capsys.readouterr().out
        assert f"forged_epoch acme/alice epoch {forged.epoch} on {real.node_id}/" in shown
        assert f"by agent:{real.node_id}: " in shown
        breach = registry_service_pb2.Violation(kind="foreign_event", evidence="of bob")
        await stub.ReportViolations(
            registry_service_pb2.ReportViolationsRequest(violations=[breach]), metadata=metadata
        )
        assert await asyncio.to_thread(steward, "violations", tmp_path, capsys) == 1
        assert "BREACH foreign_event by edge:edge-test: of bob" in capsys.readouterr().out


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


# ---- one import path, one class


@pytest.fixture(scope="session")
def trees() -> Trees:
    """Dotted module name → syntax tree of the whole product, generated code left out."""
    return read_trees({package: ROOT / package for package in PACKAGES})


def test_import_path_ssot_compliance(trees: Trees) -> None:
    """Exactly one import path for every public thing of the tree, loaded or not."""
    paths = import_paths(trees)
    assert len(paths) > 500
    assert paths["agent_service.core.manager.Manager"] == {"agent_service.core.manager.Manager"}
    assert paths["steward.agent.run.Run"] == {"steward.agent.Run"}
    assert several(paths) == {}


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("edge.detour", "from steward.model.keys import UserKey\nfrom edge.detour import UserKey"),
        ("edge.detour", "from steward.agent.run import Run"),
        ("edge.detour", "from steward.config import settings as s\n\n\ndef f(): return s.UserKey"),
        ("steward.client", "from steward.model.keys import UserKey"),
    ],
)
def test_import_path_ssot_compliance_sees_a_second_path(
    where: str, source: str, trees: Trees
) -> None:
    planted = {**trees, where: ast.parse(source)}
    if "settings as s" in source:
        settings = ast.parse("from steward.model.keys import UserKey")
        planted["steward.config.settings"] = ast.Module(
            [*settings.body, *trees["steward.config.settings"].body], []
        )
    assert several(import_paths(planted)).keys() & {
        "steward.model.keys.UserKey",
        "steward.agent.run.Run",
    }


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("version", "how"),
    [("0.1.0", "session"), ("0.0.9", "session"), ("", "session"), ("0.0.9", "unary")],
)
async def test_websocket_manager_factory_consolidation(
    version: str, how: str, make_cluster: MakeCluster, managers: FindManagers
) -> None:
    """Whichever way and version a client comes by, over gRPC, it ends at the one manager."""
    cluster: InProcessCluster = await make_cluster()
    ours = await cluster.edge("edge-0").attach(ALICE)
    async with registry_door(cluster) as (stub, metadata):
        if how == "unary":
            request = registry_service_pb2.ResolveManagersRequest(users=[query(ALICE)])
            answer = await stub.ResolveManagers(request, metadata=metadata, timeout=BOUND_S)
        else:
            answer = await resolve_on_a_session(stub, metadata, version)
    placement = answer.results[0].placement
    assert placement.epoch == ours.epoch

    late = cluster.edge("edge-late")
    at = Placement(
        ALICE,
        Epoch(placement.epoch),
        NodeId(placement.node_id),
        NodeRev(placement.node_rev),
        placement.address,
    )
    theirs = await late.attach(ALICE, placement=at)
    assert isinstance(theirs.answer, AnswerAttached)
    assert theirs.answer.stream_id == ours.answer.stream_id
    assert len(managers(ALICE)) == 1


@pytest.mark.asyncio
@pytest.mark.xfail(
    strict=True,
    raises=KeyError,
    reason="rolling upgrades: a deprecation signal to clients of an older protocol version",
)
async def test_websocket_manager_factory_consolidation_signals_deprecation(
    make_cluster: MakeCluster,
) -> None:
    cluster: InProcessCluster = await make_cluster()
    async with registry_door(cluster) as (stub, metadata):
        old = (*metadata, ("steward-protocol", "1.-1"))
        request = registry_service_pb2.ResolveManagersRequest(users=[query(ALICE)])
        call = stub.ResolveManagers(request, metadata=old, timeout=BOUND_S)
        await call
        assert dict(await call.trailing_metadata())["steward-deprecation"]


def query(user: UserKey) -> registry_service_pb2.UserQuery:
    key = placement_pb2.UserKey(tenant_id=user.tenant, user_id=user.user)
    return registry_service_pb2.UserQuery(user=key)


async def resolve_on_a_session(
    stub: Any, metadata: Any, version: str
) -> registry_service_pb2.ResolveManagersResponse:
    """Hello, welcome, one resolve: as an edge of that version says it."""
    request = registry_service_pb2.HoldEdgeSessionRequest
    session = stub.HoldEdgeSession(metadata=metadata)
    hello = registry_service_pb2.EdgeHello(cluster="test", edge_id="old", version=version)
    await session.write(request(hello=hello))
    welcome = await asyncio.wait_for(session.read(), BOUND_S)
    assert welcome.WhichOneof("body") == "welcome"
    users = registry_service_pb2.ResolveManagersRequest(request_id=7, users=[query(ALICE)])
    await session.write(request(resolve=users))
    answer = await asyncio.wait_for(session.read(), BOUND_S)
    while answer.WhichOneof("body") == "nodes":  # Of no body, to an edge that knows none.
        answer = await asyncio.wait_for(session.read(), BOUND_S)
    session.cancel()
    assert answer.resolved.request_id == 7
    resolved: registry_service_pb2.ResolveManagersResponse = answer.resolved
    return resolved


@contextlib.asynccontextmanager
async def registry_door(
    cluster: InProcessCluster, key: Ed25519PrivateKey | None = None, name: str = "test"
) -> Any:
    """The real gRPC server of the registry in front of the cluster's driver: (stub, metadata)."""
    key = key or Ed25519PrivateKey.generate()
    server = make_server(RoleVerifier(key, name), ALLOWED)
    metrics = RegistryMetrics(CollectorRegistry())
    servicer = RegistryServicer(cluster.driver, name, metrics, Tracing(), cluster.census)
    registry_service_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with make_channel(f"127.0.0.1:{port}") as channel:
            credentials = RoleCredentials(key, Role.EDGE, name, "edge-test")
            metadata = (("authorization", f"Bearer {credentials.token()}"),)
            stub: Any = registry_service_pb2_grpc.RegistryServiceStub(channel)
            stub.address = f"127.0.0.1:{port}"
            yield stub, metadata
    finally:
        await server.stop(0)


def test_duplicate_manager_class_detection(trees: Trees) -> None:
    """One class in the tree plays the role, and one function makes it; a second is seen."""
    manager = "agent_service.core.manager.Manager"
    assert roles_of_a_manager(trees) == ROLES
    assert all(who == {manager} for role, who in ROLES.items() if "make" not in role)
    copied = {**trees, "agent_service.host.manager2": trees["agent_service.core.manager"]}
    assert all(len(roles_of_a_manager(copied)[role]) == 2 for role in ("spends grants",))


@pytest.mark.asyncio
@pytest.mark.parametrize("injected", ["same epoch", "higher epoch", "fenced node"])
async def test_duplicate_manager_class_detection_at_run_time(
    injected: str, make_cluster: MakeCluster, managers: FindManagers
) -> None:
    """A second live manager of a user never becomes effective: fenced, counted, audited, soon."""
    cluster: InProcessCluster = await make_cluster(nodes=2)
    edge, other_edge = cluster.edge("edge-0"), cluster.edge("edge-1")
    await edge.attach(ALICE)
    await edge.send(ALICE, "m1", "before")
    await eventually(lambda: "agent_completed" in edge.types(ALICE), "a run")
    real = edge.placements[ALICE]
    holder = cluster.node_of(real)
    (rogue,) = (node for node in cluster.nodes.values() if node is not holder)

    def inject(epoch: int) -> Placement:
        """Make a node believe in a placement that the registry never granted."""
        forged = Placement(ALICE, Epoch(epoch), *rogue.incarnation, rogue.address)
        rogue.host.granted([forged])
        return forged

    began = asyncio.get_running_loop().time()
    if injected == "same epoch":
        answered = await other_edge.attach(ALICE, placement=inject(real.epoch))
        assert isinstance(answered.answer, AnswerRefused)
        loser, kind, good = rogue, "stale_seal", edge
    else:
        if injected == "higher epoch":
            legitimate = inject(real.epoch + 1000)
        else:
            await cluster.fence(holder)  # The process itself does not hear it: a zombie.
            legitimate = await cluster.resolve(ALICE)
        answered = await other_edge.attach(ALICE, placement=legitimate)
        assert isinstance(answered.answer, AnswerAttached)
        assert len(managers(ALICE)) == 2, "both are alive; the log has to tell them apart"
        shown = len(edge.payloads[ALICE])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await edge.send(ALICE, "m2", "of the one that lost")
        loser, kind, good = holder, "stale_append", other_edge
        assert len(edge.payloads[ALICE]) == shown, "nothing of it was ever shown"
        assert edge.lost[ALICE] == [(real.epoch, Reason.EPOCH_STALE, answered.epoch)]
    assert len(managers(ALICE)) == 1
    assert loser.host.managers == 0
    assert loser.refused(kind) == 1
    assert asyncio.get_running_loop().time() - began < BOUND_S

    await good.send(ALICE, "m3", "after")
    await eventually(lambda: good.types(ALICE)[-1:] == ["agent_completed"], "a run after it")
    page = await cluster.log.read(ALICE, ReadRange(limit=1000))
    events = [orjson.loads(payload) for payload in page.events]
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert not any("of the one that lost" in str(event) for event in events)

    if injected == "fenced node":
        # The registry keeps what a node of its own says; this one is none any more.
        assert [row.node_id for row in await cluster.ledger("fence")] == [holder.name]
    else:
        rows = await eventually(cluster.violations, "it is on record")
        # The loser also gave back a placement that was not its own: refused as well.
        kinds = {row.kind for row in rows}
        assert kind in kinds and kinds <= {kind, "foreign_release"}
        assert all((row.user, row.node_id) == ("alice", loser.name) for row in rows)
        assert all(row.evidence for row in rows)


@pytest.mark.asyncio
async def test_duplicate_manager_class_detection_of_one_that_writes_nothing(
    make_cluster: MakeCluster,
) -> None:
    """The census compares what nodes really hold, and sees a duplicate that does nothing."""
    quick = CensusConfig(interval_ms=100, least_ms=100, ties_ms=100)
    cluster: InProcessCluster = await make_cluster(nodes=2, census=quick)
    edge = cluster.edge("edge-0")
    await edge.attach(ALICE)
    real = edge.placements[ALICE]
    (rogue,) = (node for node in cluster.nodes.values() if node.name != real.node_id)
    forged = Placement(ALICE, Epoch(real.epoch + 1000), *rogue.incarnation, rogue.address)
    rogue.host.granted([forged])
    await cluster.edge("edge-1").attach(ALICE, placement=forged)

    def breaches() -> float:
        families = cluster.registry_metrics.registry.collect()
        samples = [s for family in families for s in family.samples]
        return sum(s.value for s in samples if s.name == "steward_breaches_total")

    assert await eventually(breaches, "the duplicate is counted as a breach", within_s=BOUND_S)
    rows = await eventually(cluster.violations, "it is on record")
    (row,) = (row for row in rows if row.kind == "duplicate_manager")
    assert (row.user, row.epoch, row.node_id) == ("alice", forged.epoch, rogue.name)
    assert f"{real.node_id}/{real.node_rev} under {real.epoch}" in row.evidence


# ---- nothing in common


class Spans:
    """A span exporter that keeps everything that would leave the process."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.said: list[str] = []

    def export(self, span: FinishedSpan) -> None:
        self.names.append(span.name)
        links = [dict(link.attributes) for link in span.links]
        self.said.append(f"{span.name} {dict(span.attributes)!r} {links!r}")

    def close(self) -> None:
        pass


PER_MINUTE = 30


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(6))
async def test_user_session_state_isolation(
    seed: int, make_cluster: MakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Canaries of one user in all that agents touch; none is ever seen by another, or in a log."""
    caplog.set_level(logging.DEBUG)
    luck = random.Random(seed)
    spans = Spans()
    names = ("keep", "echo", "wait")
    policy = ManagerPolicy(
        tuple(AgentPolicy(name, "queue") for name in names),
        max_waiting_runs=1000,
        messages_per_minute=PER_MINUTE,
    )
    cluster: InProcessCluster = await make_cluster(policy=policy, tracing=Tracing(spans, 1.0))
    edge = cluster.edge("edge-0")
    users = [ALICE, OTHER_ALICE, BOB, CAROL]
    told: dict[UserKey, list[str]] = {user: [] for user in users}
    failing: dict[UserKey, int] = dict.fromkeys(users, 0)
    canary = {user: f"canary{luck.getrandbits(64):016x}" for user in users}
    await asyncio.gather(*(edge.attach(user) for user in users))

    for _ in range(40):
        user = luck.choice(users)
        match luck.choice(("tell", "tell", "tell", "fail", "wait", "cancel", "attach")):
            case "wait":
                await edge.send(user, f"w{luck.random()}", canary[user], agent="wait", thread="w")
            case "cancel":
                await edge.cancel(user, thread="w")
            case "attach":
                await edge.attach(user)
            case what:
                # All of them use the same ids of messages.
                number = len(told[user])
                text = f"{canary[user]} {what} {number}"
                answered = await edge.send(user, f"m{number}", text)
                assert isinstance(answered.answer, AnswerAccepted)
                assert not answered.answer.duplicate
                told[user].append(text)
                failing[user] += what == "fail"
    # One user uses up its own quota, and nobody else's.
    greedy = luck.choice(users)
    refused = None
    for number in range(2 * PER_MINUTE):
        answered = await edge.send(greedy, f"g{number}", canary[greedy], agent="echo", thread="g")
        if isinstance(answered.answer, AnswerRefused):
            refused = answered.answer.reason
            break
    assert refused is Reason.RATE_LIMITED
    for user in users:
        if user != greedy:
            answered = await edge.send(user, "last", canary[user], agent="echo", thread="g")
            assert isinstance(answered.answer, AnswerAccepted)

    def kept(user: UserKey) -> list[dict[str, Any]]:
        events = edge.events(user)
        return [e for e in events if e["type"] == "agent_completed" and e["agent"] == "keep"]

    await eventually(
        lambda: all(len(kept(user)) == len(told[user]) for user in users), "all runs end"
    )
    keys: set[str] = set()
    run_ids: set[str] = set()
    for user in users:
        succeeded = [event["data"] for event in kept(user) if event["data"]["outcome"] == "success"]
        assert len(succeeded) == len(told[user]) - failing[user]
        for data in succeeded:
            mine = told[user][: len(data["result"]["state"])]
            assert data["result"]["state"] == data["result"]["messages"] == mine
            assert data["result"]["key"] not in keys
            keys.add(data["result"]["key"])
        mine_runs = {e["run_id"] for e in edge.events(user)}
        assert not mine_runs & run_ids
        run_ids |= mine_runs

    logs = [JsonLines("test", "test").format(record) for record in caplog.records]
    metrics = [generate_latest(node.metrics.registry) for node in cluster.nodes.values()]
    metrics.append(generate_latest(cluster.registry_metrics.registry))
    ledger = repr(await cluster.ledger())
    for user in users:
        secret = canary[user]
        assert secret.encode() in b"".join(edge.payloads[user]), "the canaries are alive"
        for other in users:
            if other != user:
                assert secret.encode() not in b"".join(edge.payloads[other])
                assert secret not in repr(edge.answers[other])
        assert not [line for line in logs if secret in line]
        assert not [text for text in spans.said if secret in text]
        assert not [text for text in metrics if secret.encode() in text]
        assert secret not in ledger
    assert {"manager.admit", "invoke_agent keep"} <= set(spans.names)
    assert any("failed" in line for line in logs) == any(failing.values())


# ---- the registry's own picture


def placements_in(path: Path) -> list[Placement]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        rows = database.execute(
            "SELECT tenant, user, epoch, node_id, node_rev, address FROM placement"
        ).fetchall()
    return [Placement(UserKey(t, u), Epoch(e), n, r, a) for t, u, e, n, r, a in rows]


def living_in(path: Path) -> list[NodeIncarnation]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT node_id, node_rev FROM node").fetchall()
    return [NodeIncarnation(*row) for row in rows]


CORRUPTIONS = {
    "nothing": ("SELECT 1", []),
    "two placements": (
        "INSERT INTO placement SELECT tenant, user, epoch + 1, 'node-9', 9, address"
        " FROM placement WHERE user = 'alice'",
        [(Disagreement.TWO_PLACEMENTS, ALICE), (Disagreement.DEAD_NODE, ALICE)],
    ),
    "a missing one": (
        "DELETE FROM placement WHERE user = 'bob'",
        [(Disagreement.NO_PLACEMENT, BOB)],
    ),
    "a dead node": (
        "UPDATE node SET node_rev = node_rev + 100 WHERE node_id ="
        " (SELECT node_id FROM placement WHERE user = 'carol')",
        [(Disagreement.DEAD_NODE, CAROL)],
    ),
    "another epoch": (
        "UPDATE placement SET epoch = epoch + 1 WHERE user = 'carol'",
        [(Disagreement.OTHER_HOLDER, CAROL)],
    ),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("corruption", CORRUPTIONS)
async def test_manager_registry_isolation_validation(
    corruption: str, make_cluster: MakeCluster, managers: FindManagers, tmp_path: Path
) -> None:
    """Three users, three placements; whatever is damaged in the file, the check names it."""
    users = (ALICE, BOB, CAROL)
    cluster: InProcessCluster = await make_cluster(nodes=3)
    edge = cluster.edge("edge-0")
    for user in users:
        await edge.attach(user)
    live = [
        LiveManager(user, manager.epoch, cluster.node_of(edge.placements[user]).incarnation)
        for user in users
        for manager in managers(user)
    ]
    assert len({(p.user, p.epoch, p.incarnation) for p in edge.placements.values()}) == 3
    await cluster.driver.stop()
    path = tmp_path / "registry.db"
    statement, expected = CORRUPTIONS[corruption]
    with contextlib.closing(sqlite3.connect(path)) as database:
        if corruption == "two placements":
            with pytest.raises(sqlite3.IntegrityError):
                database.execute(statement)
            # The schema does not let it happen; so take the schema away.
            database.executescript(
                "CREATE TABLE loose AS SELECT * FROM placement;"
                "DROP TABLE placement; ALTER TABLE loose RENAME TO placement;"
            )
        database.execute(statement)
        database.commit()

    found = findings(placements_in(path), living_in(path), live)

    of_others = [f for f in found if f.user not in {user for _, user in expected}]
    if corruption == "a dead node":
        # Who else lived on that node is dead as well.
        dead = edge.placements[CAROL].incarnation
        of_others = [f for f in of_others if edge.placements[f.user].incarnation != dead]
    assert of_others == []
    assert {(f.kind, f.user) for f in found} >= set(expected)
    assert bool(found) == bool(expected)
    assert all(f.evidence for f in found)
    if corruption == "two placements":
        two = [*live, LiveManager(ALICE, Epoch(99), NodeIncarnation(NodeId("node-9"), NodeRev(9)))]
        kinds = {f.kind for f in findings(placements_in(path), living_in(path), two)}
        assert Disagreement.TWO_MANAGERS in kinds


@pytest.mark.asyncio
async def test_manager_registry_isolation_validation_of_a_running_cluster(
    make_cluster: MakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`steward compliance` reports a running cluster: all is kept, until something is not."""
    quick = CensusConfig(
        interval_ms=100, least_ms=100, ties_ms=100, again_ms=120, patience_ms=4_000
    )
    cluster: InProcessCluster = await make_cluster(nodes=2, census=quick)
    edge = cluster.edge("edge-0")
    for user in (ALICE, BOB, CAROL):
        await edge.attach(user)
    key = load_or_create_key(tmp_path, CONTROL_KEY)
    async with registry_door(cluster, key, CLUSTER_NAME) as (stub, _):
        registry = ProcessEntry("registry", "registry", os.getpid(), stub.address, None, None)
        write_cluster(tmp_path, ClusterFile(os.getpid(), "", (registry,)))
        await eventually(lambda: cluster.census.complete_ms, "a census was taken")
        assert await asyncio.to_thread(steward, "compliance", tmp_path, capsys, "--no-code") == 0
        shown = capsys.readouterr().out
        assert "2 nodes with 3 managers, 3 placements" in shown
        assert "BROKEN" not in shown

        await PLANTS["stale"](cluster, edge, ALICE)
        assert await asyncio.to_thread(steward, "compliance", tmp_path, capsys, "--no-code") == 1
        shown = capsys.readouterr().out
        assert "BROKEN       no manager lives on under an epoch that is over" in shown
        assert f"acme/alice: a manager on {edge.placements[ALICE].node_id}/" in shown


# ---- no mutable object in common

IMMUTABLE = (str, bytes, int, float, bool, type(None), frozenset, tuple, Enum)
BEYOND = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType)
"""Where the walk ends: code and what belongs to it is shared by everything."""


def is_frozen(thing: object) -> bool:
    parameters = getattr(type(thing), "__dataclass_params__", None)
    return isinstance(thing, IMMUTABLE) or bool(parameters and parameters.frozen)


def mutable_reachable(*roots: object) -> dict[int, object]:
    """Every mutable object that can be reached from these, by id."""
    seen: dict[int, object] = {}
    waiting = list(roots)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, BEYOND):
            continue
        seen[id(thing)] = thing
        if not isinstance(thing, Enum):
            waiting.extend(gc.get_referents(thing))
    return {key: thing for key, thing in seen.items() if not is_frozen(thing)}


@pytest.mark.asyncio
async def test_enum_mode_isolation_validation(
    make_cluster: MakeCluster, managers: FindManagers
) -> None:
    """Two managers of one node share no mutable object; what they share can't be changed."""
    cluster: InProcessCluster = await make_cluster(nodes=1)
    edge = cluster.edge("edge-0")
    for user, overlap in ((ALICE, "queue"), (BOB, "reject")):
        await edge.attach(user)
        await edge.send(user, "m1", "something", agent="keep")
        await edge.send(user, "m2", "x", agent="wait", thread="w", overlap=overlap)
        await edge.send(user, "m3", "x", agent="wait", thread="w", overlap=overlap)
    await eventually(
        lambda: all("agent_completed" in edge.types(user) for user in (ALICE, BOB)), "runs"
    )
    # The mode that one user chose is of its messages alone.
    last = {user: edge.answers[user][-1].answer for user in (ALICE, BOB)}
    assert isinstance(last[ALICE], AnswerAccepted) and last[ALICE].queue_position == 1
    assert isinstance(last[BOB], AnswerRefused)
    assert last[BOB].reason is Reason.OVERLAP_REJECTED

    (of_alice,), (of_bob,) = managers(ALICE), managers(BOB)
    ours, theirs = mutable_reachable(of_alice), mutable_reachable(of_bob)
    assert len(ours) > 20, "the walk went somewhere"
    shared = [thing for key, thing in ours.items() if key in theirs]
    assert shared == []
    of_agents = sys.modules["steward_agent_0_agents_of_ssot"].KEPT
    by_user = {user: things for user, *things in of_agents}
    assert by_user.keys() == {"alice", "bob"}
    reachable = [mutable_reachable(*by_user[user]) for user in ("alice", "bob")]
    assert reachable[0] and not reachable[0].keys() & reachable[1].keys()

    # The walk finds what is hidden deep.
    leak: list[str] = []
    of_alice._state.runs["leak"] = (leak,)  # type: ignore[index, assignment]
    of_bob._agents["leak"] = leak  # type: ignore[assignment]
    assert id(leak) in mutable_reachable(of_alice).keys() & mutable_reachable(of_bob).keys()
    del of_alice._state.runs["leak"], of_bob._agents["leak"]  # type: ignore[arg-type]

    policy = of_alice._policy
    assert policy is of_bob._policy
    with pytest.raises(FrozenInstanceError):
        policy.messages_per_minute = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        policy.agents[0] = AgentPolicy("other", "queue")  # type: ignore[index]
    for mode in (EventType, Reason, Disagreement):
        with pytest.raises(AttributeError):
            next(iter(mode)).value = "another"  # type: ignore[misc]
