"""`cluster.json`: its exact shape, and what a reader is told when there is no cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steward.cli.cluster_file import (
    ClusterFile,
    NoCluster,
    ProcessEntry,
    read_cluster,
    remove_cluster,
    write_cluster,
)

REGISTRY = ProcessEntry("registry", "registry", 41, "127.0.0.1:5001", None, "127.0.0.1:5002")
EDGE = ProcessEntry("edge", "edge-0", 42, None, "127.0.0.1:8080", "127.0.0.1:5003")


def cluster(pid: int) -> ClusterFile:
    return ClusterFile(pid, "http://127.0.0.1:8080", (REGISTRY, EDGE))


def test_the_file_has_the_promised_shape(tmp_path: Path) -> None:
    write_cluster(tmp_path, cluster(7))
    assert json.loads((tmp_path / "cluster.json").read_text()) == {
        "pid": 7,
        "url": "http://127.0.0.1:8080",
        "processes": [
            {
                "role": "registry",
                "id": "registry",
                "pid": 41,
                "grpc": "127.0.0.1:5001",
                "http": None,
                "ops": "127.0.0.1:5002",
            },
            {
                "role": "edge",
                "id": "edge-0",
                "pid": 42,
                "grpc": None,
                "http": "127.0.0.1:8080",
                "ops": "127.0.0.1:5003",
            },
        ],
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_cluster(tmp_path, cluster(os.getpid()))
    assert read_cluster(tmp_path) == cluster(os.getpid())


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    write_cluster(tmp_path, cluster(1))
    write_cluster(tmp_path, cluster(2))
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.json"]


def test_a_file_whose_supervisor_is_dead_is_no_cluster(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_cluster(tmp_path, cluster(ended.pid))
    with pytest.raises(NoCluster, match="dead"):
        read_cluster(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"pid": 1}', '{"pid":1,"url":"","processes":[{}]}'])
def test_a_file_that_is_something_else_is_no_cluster(tmp_path: Path, content: str) -> None:
    (tmp_path / "cluster.json").write_text(content)
    with pytest.raises(NoCluster, match="can't be read"):
        read_cluster(tmp_path)


def test_a_missing_file_says_how_to_start_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(NoCluster, match="steward up"):
        read_cluster(tmp_path)


def test_a_role_that_is_not_there_is_named() -> None:
    assert cluster(1).address("registry") == "127.0.0.1:5001"
    with pytest.raises(NoCluster, match="no log"):
        cluster(1).address("log")


def test_removing_twice_is_fine(tmp_path: Path) -> None:
    write_cluster(tmp_path, cluster(1))
    remove_cluster(tmp_path)
    remove_cluster(tmp_path)
    assert not (tmp_path / "cluster.json").exists()
