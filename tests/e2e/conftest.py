"""A real cluster for the end-to-end tests: `steward up`, on its own data and port, cleaned up.

`cluster` is one with the default processes; `start_cluster` starts one with other options, or
one that is meant to fail. The logs of all processes are shown when a test fails.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from steward.testing.local_cluster import LocalCluster, free_ports

StartCluster = Callable[..., LocalCluster]


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


@pytest.fixture
def cluster(start_cluster: StartCluster) -> LocalCluster:
    """A running cluster: registry, auth, log, two nodes, one edge."""
    return start_cluster().wait_ready()
