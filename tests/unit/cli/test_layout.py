"""What `steward up` starts, and where: by options and environment."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from steward.cli.datadir import DataDirectory
from steward.cli.layout import ClusterPlan, LayoutError, lay_out
from steward.cli.ports import PortReservations
from steward.cli.supervisor import ProcessSpec
from steward.testing.local_cluster import free_ports

LayOut = Callable[..., tuple[ProcessSpec, ...]]


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[LayOut]:
    ports = PortReservations()
    free = free_ports(2)

    def make(
        environ: Mapping[str, str] | None = None, **options: object
    ) -> tuple[ProcessSpec, ...]:
        values = {"agents": 2, "edges": 1, "port": free, "entrypoints": (), **options}
        return lay_out(ClusterPlan(**values), DataDirectory(tmp_path), ports, environ or {})  # type: ignore[arg-type]

    yield make
    ports.close()


def option(spec: ProcessSpec, name: str) -> str:
    return spec.command[spec.command.index(name) + 1]


def test_default_cluster_has_three_services_two_nodes_and_an_edge(plan: LayOut) -> None:
    assert [(spec.role, spec.id) for spec in plan()] == [
        ("registry", "registry"),
        ("auth", "auth"),
        ("log", "log"),
        ("agent", "node-0"),
        ("agent", "node-1"),
        ("edge", "edge-0"),
    ]


def test_only_edges_speak_http_and_only_the_others_grpc(plan: LayOut) -> None:
    for spec in plan():
        assert (spec.http is not None) == (spec.role == "edge")
        assert (spec.grpc is None) == (spec.role == "edge")


def test_peers_are_told_where_the_others_are(plan: LayOut) -> None:
    registry, auth, log, node, _, edge = plan()
    assert option(node, "--registry") == registry.grpc
    assert option(node, "--log") == log.grpc
    assert option(edge, "--registry") == registry.grpc
    assert option(edge, "--auth") == auth.grpc


def test_edge_i_listens_on_port_plus_i(plan: LayOut) -> None:
    edges = [spec for spec in plan(edges=2) if spec.role == "edge"]
    first, second = (int(option(spec, "--port")) for spec in edges)
    assert second == first + 1
    assert edges[1].http == f"127.0.0.1:{second}"


def test_no_two_processes_share_a_port(plan: LayOut) -> None:
    addresses = [
        address
        for spec in plan(agents=5, edges=2)
        for address in (spec.grpc, spec.http, spec.ops)
        if address is not None
    ]
    assert len(addresses) == len(set(addresses)) == 20


def test_a_port_that_the_environment_sets_is_used(plan: LayOut) -> None:
    holder = PortReservations()
    wanted = holder.reserve()
    holder.close()
    nodes = [
        spec
        for spec in plan({"STEWARD_AGENT_OPS_PORT": str(wanted)}, agents=1)
        if spec.role == "agent"
    ]
    assert nodes[0].ops == f"127.0.0.1:{wanted}"


@pytest.mark.parametrize(
    "options",
    [
        {"agents": 0},
        {"edges": 65},
        {"port": 0},
        {"port": 65535, "edges": 2},
        {"entrypoints": ("agent.py",)},
        {"entrypoints": ("a.py:f,b.py:g",)},
    ],
)
def test_impossible_plans_are_refused(plan: LayOut, options: dict[str, object]) -> None:
    with pytest.raises(LayoutError):
        plan(**options)


def test_a_port_in_the_environment_that_is_none_is_refused_by_its_name(plan: LayOut) -> None:
    with pytest.raises(LayoutError, match="STEWARD_LOG_GRPC_PORT"):
        plan({"STEWARD_LOG_GRPC_PORT": "http"})


def test_own_agents_go_to_every_node(plan: LayOut) -> None:
    for spec in plan(entrypoints=("a.py:f", "pkg.mod:g")):
        if spec.role == "agent":
            assert option(spec, "--entrypoints") == "a.py:f,pkg.mod:g"
