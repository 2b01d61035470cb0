"""A real cluster for the end-to-end tests: `steward up`, on its own data and port, cleaned up.

`cluster` is one with the default processes; `start_cluster` starts one with other options, or
one that is meant to fail; `start_shared` one for all tests of a module, which has to show no
breach at the end. The logs of all processes are shown when a test fails.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from steward.model.keys import DEFAULT_TENANT, UserKey
from steward.rpc.keys import USER_KEY, load_or_create_key
from steward.testing.etcd import EtcdCluster, missing
from steward.testing.etcd_network import Network
from steward.testing.etcd_network import missing as no_network
from steward.testing.local_cluster import LocalCluster, free_ports
from steward.tokens import mint

StartCluster = Callable[..., LocalCluster]
AGENTS = Path(__file__).parent / "agents.py"


@pytest.fixture(scope="session")
def network() -> Iterator[Network | None]:
    """Where the members of etcd are, each on a host of its own; None where that can't be had."""
    if no_network():
        yield None
        return
    with Network() as made:
        yield made


@pytest.fixture(scope="session")
def etcd(
    tmp_path_factory: pytest.TempPathFactory, network: Network | None
) -> Iterator[EtcdCluster]:
    """Three members that every test leaves whole."""
    if why := missing():
        pytest.skip(why)
    with EtcdCluster(tmp_path_factory.mktemp("etcd"), network=network) as cluster:
        yield cluster


@pytest.fixture
def free_port() -> int:
    """A port that was free a moment ago."""
    return free_ports(1)


@pytest.fixture
def start_cluster(tmp_path: Path, clusters_to_show: list[LocalCluster]) -> Iterator[StartCluster]:
    """Start `steward up` with options, without waiting. After the test all of it is ended."""
    started: list[LocalCluster] = []

    def start(*options: str, **how: Any) -> LocalCluster:
        cluster = LocalCluster.start(tmp_path, *options, **how)
        started.append(cluster)
        clusters_to_show.append(cluster)
        return cluster

    yield start
    for cluster in started:
        cluster.end()


@pytest.fixture(scope="module")
def start_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartCluster]:
    """Start a cluster with the agents of `agents.py` for a module, and wait until it is ready.

    At the end of the module it must not have seen a breach.
    """
    started: list[LocalCluster] = []

    def start(*options: str, **how: Any) -> LocalCluster:
        agents = [f"--agent={AGENTS}:{name}" for name in ("counter", "worker")]
        cluster = LocalCluster.start(tmp_path_factory.mktemp("up"), *agents, *options, **how)
        started.append(cluster)
        return cluster.wait_ready()

    try:
        yield start
        for cluster in started:
            assert cluster.steward("violations", "--breaches").stdout == "", cluster.logs()
    finally:
        for cluster in started:
            cluster.end()


@pytest.fixture
def token_of() -> Callable[[LocalCluster, str], str]:
    """A token of a user, made in this process: `steward token` takes a second."""

    def token_of(cluster: LocalCluster, user: str) -> str:
        key = load_or_create_key(cluster.data, USER_KEY)
        return mint(key, UserKey(DEFAULT_TENANT, user), 3600)

    return token_of


@pytest.fixture
def refusals_of() -> Callable[..., list[dict[str, Any]]]:
    """`refusals_of(cluster, **fields)`: the refusals on record with these fields, oldest first."""

    def refusals_of(cluster: LocalCluster, **fields: Any) -> list[dict[str, Any]]:
        lines = cluster.steward("violations", "--json", "--limit", "1000").stdout.splitlines()
        found = map(json.loads, lines)
        return [
            one for one in found if one["severity"] == "refusal" and fields.items() <= one.items()
        ]

    return refusals_of


@pytest.fixture
def check_report() -> Callable[[LocalCluster], None]:
    """`check_report(cluster)`: nothing is broken in the report of a running cluster.

    The census must have asked everybody: what was not checked could be anything.
    """

    def check_report(cluster: LocalCluster) -> None:
        answer = cluster.try_steward("compliance", "--no-code", "--json")
        lines = {line["id"]: line for line in json.loads(answer.stdout)["lines"]}
        broken = [line for line in lines.values() if line["verdict"] == "broken"]
        assert (answer.returncode, broken) == (0, [])
        assert lines["census"]["verdict"] == "kept", lines["census"]

    return check_report


@pytest.fixture
def cluster(start_cluster: StartCluster) -> LocalCluster:
    """A running cluster: registry, auth, log, two nodes, one edge."""
    return start_cluster().wait_ready()
