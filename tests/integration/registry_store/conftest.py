"""A real etcd of three members for all tests here that do it no harm, and some for those that do.

Tests that say so also run on a newer etcd than the one that is installed, where `make etcd` has
built it.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from steward.testing.etcd import EtcdCluster, missing

NEWER = Path(__file__).parents[3] / ".etcd" / "etcd"

_names = itertools.count(1)


@pytest.fixture(scope="session")
def installed() -> str:
    """The program that is installed."""
    why = missing()
    if why:
        pytest.skip(why)
    return "etcd"


@pytest.fixture(scope="session")
def newer(installed: str) -> str:
    """The program that was built."""
    if not NEWER.exists():
        pytest.skip("skipped: no newer etcd (make etcd)")
    return str(NEWER)


@pytest.fixture(scope="session")
def etcd(installed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """Three members that every test leaves as it found them."""
    with EtcdCluster(tmp_path_factory.mktemp("etcd"), program=installed) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def newer_etcd(newer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """One member of the newer version: for what it answers, not for its outages."""
    with EtcdCluster(tmp_path_factory.mktemp("newer"), 1, program=newer) as cluster:
        yield cluster


MakeEtcd = Callable[..., list[EtcdCluster]]


@pytest.fixture
def make_etcd(tmp_path: Path) -> Iterator[MakeEtcd]:
    """`make_etcd(program, program)`: clusters of three that a test may kill, started together."""
    with ExitStack() as stack:

        def make(*programs: str) -> list[EtcdCluster]:
            made = []
            for number, program in enumerate(programs):
                cluster = EtcdCluster(tmp_path / f"etcd-{number}", program=program)
                stack.callback(cluster.stop)
                cluster.launch()
                made.append(cluster)
            for cluster in made:
                cluster.wait_healthy()
            return made

        yield make


@pytest.fixture
def own_etcd(make_etcd: MakeEtcd, installed: str) -> EtcdCluster:
    """Three members that a test may kill."""
    (cluster,) = make_etcd(installed)
    return cluster


@pytest.fixture
def cluster_name() -> str:
    """A name under which nobody has kept anything yet."""
    return f"test-{next(_names)}"
