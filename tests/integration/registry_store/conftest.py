"""A real etcd of three members for all tests here that do it no harm, and one for those that do."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from steward.testing.etcd import EtcdCluster, missing

_names = itertools.count(1)


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """Three members that every test leaves as it found them."""
    why = missing()
    if why:
        pytest.skip(why)
    with EtcdCluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdCluster]:
    """Three members that a test may kill."""
    why = missing()
    if why:
        pytest.skip(why)
    with EtcdCluster(tmp_path / "etcd") as cluster:
        yield cluster


@pytest.fixture
def cluster_name() -> str:
    """A name under which nobody has kept anything yet."""
    return f"test-{next(_names)}"
