"""Every line of `steward compliance` turns red, each by a fault of its own, planted for real."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from registry_service.census.rounds import CensusConfig
from registry_service.server import ALLOWED, RegistryServicer
from steward.cli.cluster_file import CLUSTER_NAME, ClusterFile, ProcessEntry, write_cluster
from steward.cli.main import run_command
from steward.cli.report.source import PACKAGES
from steward.cli.report.static import static_lines
from steward.model.keys import UserKey
from steward.model.violations import Violation, ViolationKind
from steward.rpc.factory import make_server
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import RoleVerifier
from steward.telemetry.catalog import RegistryMetrics
from steward.telemetry.tracing import Tracing
from steward.testing.cluster import EdgeProbe, InProcessCluster
from steward.testing.planted import PLANTS
from steward.testing.waiting import eventually
from steward.v1 import registry_service_pb2_grpc

MakeCluster = Callable[..., Any]
Report = dict[str, dict[str, Any]]

ROOT = Path(__file__).parents[3]
ALICE = UserKey("acme", "alice")
BOB = UserKey("acme", "bob")
QUICK = CensusConfig(
    interval_ms=200, answer_ms=500, least_ms=50, ties_ms=100, again_ms=60, patience_ms=3_000
)

OF_THE_CENSUS = {
    "no-duplicate",
    "no-stale",
    "no-orphan",
    "no-unsealed",
    "no-unreachable",
    "no-misattached",
}
RUNNING = OF_THE_CENSUS | {
    "census",
    "census-runs",
    "no-breach",
    "refusals",
    "log-in-ledger",
    "ledger-in-log",
    "epochs-grow",
}
UNDER_LOAD = {"streams-whole", "cheats-refused"}
LINE_OF = {
    ViolationKind.DUPLICATE_MANAGER: "no-duplicate",
    ViolationKind.STALE_MANAGER: "no-stale",
    ViolationKind.ORPHAN_MANAGER: "no-orphan",
    ViolationKind.UNSEALED_MANAGER: "no-unsealed",
    ViolationKind.UNREACHABLE_USER: "no-unreachable",
    ViolationKind.MISATTACHED_EDGE: "no-misattached",
}
ASIDE = {"stale": {"log-in-ledger"}, "duplicate": {"log-in-ledger"}, "unsealed": {"log-in-ledger"}}
"""A fence that nobody granted is what these plants do; the ledger's check sees it too."""


class Town:
    """A cluster in this process, as the command sees it."""

    def __init__(self, cluster: InProcessCluster, edge: EdgeProbe, data: Path, capsys: Any) -> None:
        self.cluster = cluster
        self.edge = edge
        self._data = data
        self._capsys = capsys

    async def report(self) -> tuple[int, Report]:
        """The exit code, and the lines by id."""
        words = ["compliance", "--data", str(self._data), "--no-code", "--json"]
        code = await asyncio.to_thread(run_command, words)
        said = json.loads(self._capsys.readouterr().out)
        lines = {line["id"]: line for line in said["lines"]}
        assert said["counts"] == {
            verdict: sum(line["verdict"] == verdict for line in lines.values())
            for verdict in ("kept", "broken", "not checked")
        }
        assert all(line["how"] and line["at"] and line["evidence"] for line in lines.values())
        return code, lines

    async def sql(self, statement: str) -> None:
        """Change the registry's file behind its back."""
        store: Any = self.cluster.store
        await store._call(lambda: store._connection.execute(statement))


def broken(lines: Report) -> set[str]:
    return {name for name, line in lines.items() if line["verdict"] == "broken"}


@pytest.fixture
def make_town(make_cluster: MakeCluster, tmp_path: Path, capsys: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def make(census: CensusConfig = QUICK) -> AsyncIterator[Town]:
        cluster: InProcessCluster = await make_cluster(census=census)
        edge = cluster.edge("edge-0")
        for user in (ALICE, BOB):
            await edge.attach(user)
        key = load_or_create_key(tmp_path, CONTROL_KEY)
        server = make_server(RoleVerifier(key, CLUSTER_NAME), ALLOWED)
        metrics = RegistryMetrics(CollectorRegistry())
        servicer = RegistryServicer(
            cluster.driver, CLUSTER_NAME, metrics, Tracing(), cluster.census
        )
        registry_service_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        entry = ProcessEntry("registry", "registry", os.getpid(), address, None, None)
        write_cluster(tmp_path, ClusterFile(os.getpid(), "", (entry,)))
        if census.interval_ms:
            await eventually(lambda: cluster.census.complete_ms, "a census was taken")
        try:
            yield Town(cluster, edge, tmp_path, capsys)
        finally:
            await server.stop(0)

    return make


# ---- the running cluster


@pytest.mark.asyncio
async def test_a_healthy_cluster_keeps_every_line_and_says_what_was_not_looked_at(
    make_town: Any,
) -> None:
    async with make_town() as town:
        code, lines = await town.report()
    assert code == 0
    assert set(lines) == RUNNING | UNDER_LOAD
    verdicts = {name: line["verdict"] for name, line in lines.items()}
    assert verdicts == {
        **dict.fromkeys(RUNNING, "kept"),
        **dict.fromkeys(UNDER_LOAD, "not checked"),
    }


@pytest.mark.asyncio
@pytest.mark.parametrize("plant", PLANTS)
async def test_a_fault_of_ownership_turns_its_line_red_and_no_other(
    plant: str, make_town: Any
) -> None:
    async with make_town(CensusConfig(**{**vars_of(QUICK), "interval_ms": 0})) as town:
        kinds = await PLANTS[plant](town.cluster, town.edge, ALICE)
        code, lines = await town.report()
    expected = {LINE_OF[kind] for kind in kinds}
    assert code == 1
    # Nobody looked before, so the breach is recorded by this very census; the last line is red
    # since this census was the first.
    assert broken(lines) == expected | ASIDE.get(plant, set()) | {"no-breach", "census-runs"}
    assert all("acme/alice" in " ".join(lines[name]["evidence"]) for name in expected)


def vars_of(config: CensusConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


async def silent_node(town: Town) -> None:
    """A node does not answer the census."""
    node = next(iter(town.cluster.nodes.values()))
    node._counting.cancel()


@pytest.mark.asyncio
async def test_who_can_not_be_asked_makes_lines_unchecked_and_then_the_census_late(
    make_town: Any,
) -> None:
    async with make_town() as town:
        await silent_node(town)
        age_ms = 6 * QUICK.interval_ms / 1000
        cluster: InProcessCluster = town.cluster
        await eventually(lambda: cluster.census._age_s() > age_ms, "it is late")
        code, lines = await town.report()
    assert code == 1
    assert broken(lines) == {"census-runs"}
    for name in OF_THE_CENSUS | {"census"}:
        assert lines[name]["verdict"] == "not checked"
    assert "did not answer" in " ".join(lines["census"]["evidence"])


async def breach(town: Town) -> None:
    town.cluster.record(Violation(ViolationKind.FOREIGN_EVENT, "planted", ALICE), "edge:edge-0")


async def refusal_without_evidence(town: Town) -> None:
    town.cluster.record(Violation(ViolationKind.STALE_SEAL, "planted", ALICE), "agent:node-0")
    await town.cluster.violations()
    await town.sql("UPDATE violation SET evidence = ''")


async def grant_taken_out_of_the_ledger(town: Town) -> None:
    await town.sql("DELETE FROM ledger WHERE user = 'alice' AND kind = 'place'")


async def epoch_that_goes_down(town: Town) -> None:
    await town.sql(
        "INSERT INTO ledger (rev, at_ms, kind, tenant, user, epoch, node_id, node_rev, cause,"
        " evidence, traceparent) SELECT rev, at_ms, kind, tenant, user, 1, node_id, node_rev,"
        " cause, evidence, traceparent FROM ledger WHERE user = 'alice' AND kind = 'place'"
    )


async def log_that_forgot(town: Town) -> None:
    """The log is put back to before a manager that the ledger knows to have lived."""
    host = town.cluster.node_of(town.edge.placements[ALICE]).host
    host.edge_closed(town.edge.edge_id)
    town.edge.attached.clear()
    host.passivate_after(0)
    await eventually(lambda: town.cluster.ledger("release", ALICE), "she is passivated")
    log: Any = town.cluster.log
    del log.state._streams[ALICE]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("plant", "line", "told"),
    [
        (breach, "no-breach", "foreign_event of acme/alice: planted"),
        (refusal_without_evidence, "refusals", "stale_seal without evidence"),
        (grant_taken_out_of_the_ledger, "log-in-ledger", "the ledger has no grant of it"),
        (epoch_that_goes_down, "epochs-grow", "grants 1, after"),
        (log_that_forgot, "ledger-in-log", "the log has no fence of this user"),
    ],
)
async def test_a_doctored_record_turns_its_line_red_and_no_other(
    plant: Callable[[Town], Awaitable[None]], line: str, told: str, make_town: Any
) -> None:
    async with make_town() as town:
        await plant(town)
        code, lines = await town.report()
    assert (code, broken(lines)) == (1, {line})
    assert told in " ".join(lines[line]["evidence"])


@pytest.mark.asyncio
async def test_a_census_that_nobody_takes_turns_its_line_red(make_town: Any) -> None:
    async with make_town(CensusConfig(interval_ms=0, again_ms=10)) as town:
        code, lines = await town.report()
    assert (code, broken(lines)) == (1, {"census-runs"})


# ---- the code


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Path]:
    """A copy of the tree, to be spoiled."""
    for package in PACKAGES:
        leave_out = shutil.ignore_patterns("__pycache__", "static", "web", "node_modules")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=leave_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return {package: tmp_path / package for package in PACKAGES}


def second_path(tree: dict[str, Path]) -> None:
    file = tree["edge"] / "settings.py"
    file.write_text(f"{file.read_text()}\n\nfrom steward.agent.run import Run\n\nRUN = Run\n")


def second_manager(tree: dict[str, Path]) -> None:
    source = tree["agent_service"] / "core" / "manager.py"
    shutil.copy(source, tree["agent_service"] / "host" / "manager2.py")


def deleted_contract(tree: dict[str, Path]) -> None:
    config = tree["steward"].parent / "pyproject.toml"
    text = config.read_text()
    start = text.index('[[tool.importlinter.contracts]]\nname = "Managers are made')
    end = text.index("[[tool.importlinter.contracts]]", start + 1)
    config.write_text(text[:start] + text[end:])


def service_that_imports_another(tree: dict[str, Path]) -> None:
    file = tree["edge"] / "settings.py"
    file.write_text(f"{file.read_text()}\n\nfrom auth_service import settings as theirs\n")


@pytest.mark.parametrize(
    ("plant", "line", "told"),
    [
        (second_path, "import-paths", "steward.agent.run.Run: "),
        (second_manager, "manager-class", "agent_service.host.manager2.Manager"),
        (deleted_contract, "contracts", "no contract 'Managers are made by the host alone'"),
        (service_that_imports_another, "contracts", "edge.settings -> auth_service"),
    ],
)
def test_a_spoiled_tree_turns_its_line_red(
    plant: Callable[[dict[str, Path]], None], line: str, told: str, tree: dict[str, Path]
) -> None:
    plant(tree)
    lines = {each.id: each for each in static_lines(tree)}
    assert lines[line].verdict == "broken"
    assert told in " ".join(lines[line].evidence)


def test_the_tree_as_it_is_keeps_its_lines() -> None:
    lines = {each.id: each for each in static_lines()}
    assert set(lines) == {"import-paths", "manager-class", "contracts"}
    assert {name: (each.verdict, each.evidence) for name, each in lines.items()} == {
        name: ("kept", each.evidence) for name, each in lines.items()
    }


def test_an_installed_package_without_its_tree_says_that_contracts_were_not_checked(
    tree: dict[str, Path],
) -> None:
    (tree["steward"].parent / "pyproject.toml").unlink()
    lines = {each.id: each.verdict for each in static_lines(tree)}
    assert lines == {"import-paths": "kept", "manager-class": "kept", "contracts": "not checked"}
    del tree["edge"]
    lines = {each.id: each.verdict for each in static_lines(tree)}
    assert set(lines.values()) == {"not checked"}
