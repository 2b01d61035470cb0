"""`steward supervise agent`: a death is told as proof, signals pass, and both die together."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steward.testing.waiting import wait_for

STEWARD = Path(sys.executable).with_name("steward")


@pytest.fixture(scope="module")
def running(start_shared: Any) -> Any:
    return start_shared("--agents", "1")


@pytest.fixture
def supervised(running: Any, clusters_to_show: list[Any]) -> Any:
    """A cluster, and one more node under `steward supervise`: (cluster, process, node's pid)."""
    cluster = running
    clusters_to_show.append(cluster)
    wait_for(lambda: "node-x" not in nodes(cluster), 20, "the name is free")
    registry = cluster.processes["registry"]["grpc"]
    log = cluster.processes["log"]["grpc"]
    settings = ("--id", "node-x", "--data", cluster.data, "--registry", registry, "--log", log)
    process = subprocess.Popen(
        [STEWARD, "supervise", "agent", *settings],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: "node-x" in nodes(cluster), 20, "the node has joined")
        yield cluster, process, child_of(process.pid)
    finally:
        process.kill()
        process.communicate()


def nodes(cluster: Any) -> set[str]:
    status = json.loads(cluster.try_steward("status", "--json").stdout or "{}")
    return {node["node_id"] for node in status.get("nodes", [])}


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_a_death_is_reported_as_proof_and_its_code_passed_on(supervised: Any) -> None:
    cluster, process, pid = supervised
    os.kill(pid, signal.SIGKILL)
    assert process.wait(10) == 128 + signal.SIGKILL
    assert "node-x" not in nodes(cluster)
    log = (cluster.data / "logs" / "registry.log").read_text()
    fenced = [line for line in log.splitlines() if "node fenced" in line and "node-x" in line]
    assert len(fenced) == 1
    assert "reaped by its supervisor" in fenced[0] or "refuses" in fenced[0]


def test_a_signal_stops_the_node_in_order(supervised: Any) -> None:
    cluster, process, pid = supervised
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not Path(f"/proc/{pid}").exists()
    wait_for(lambda: "node-x" not in nodes(cluster), 10, "the node has left")


def test_a_killed_supervisor_takes_the_node_with_it(supervised: Any) -> None:
    _, process, pid = supervised
    process.kill()
    process.wait(5)
    assert wait_for(lambda: not Path(f"/proc/{pid}").exists(), 5, "the node is dead")


def test_without_a_name_nothing_is_started() -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("STEWARD_")}
    answer = subprocess.run(
        [STEWARD, "supervise", "agent", "--registry", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env=environ,
    )
    assert answer.returncode == 2
    assert "--id" in answer.stderr


def test_a_death_is_reported_to_a_cluster_of_another_name(
    tmp_path: Path, free_port: int, request: pytest.FixtureRequest
) -> None:
    address = f"127.0.0.1:{free_port}"
    here = ("--data", str(tmp_path), "--cluster", "eu-1")
    registry = subprocess.Popen(
        [STEWARD, "registry", *here, "--id", "registry", "--grpc-port", str(free_port)],
        stderr=subprocess.DEVNULL,
    )
    request.addfinalizer(registry.wait)
    request.addfinalizer(registry.kill)
    # Nobody listens where the log should be: the node joins all the same.
    peers = ("--id", "node-x", "--registry", address, "--log", "127.0.0.1:1")
    supervisor = subprocess.Popen(
        [STEWARD, "supervise", "agent", *here, *peers],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    request.addfinalizer(supervisor.communicate)
    request.addfinalizer(supervisor.kill)

    def joined() -> bool:
        answer = subprocess.run(
            [STEWARD, "status", *here, "--registry", address, "--json"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return "node-x" in answer.stdout

    wait_for(joined, 30, "the node has joined")
    os.kill(child_of(supervisor.pid), signal.SIGKILL)
    _, said = supervisor.communicate(timeout=20)
    assert supervisor.returncode == 128 + signal.SIGKILL
    # What is refused, as a report under another cluster's name is, would be said.
    assert "the death of node-x" not in said
    assert not joined()
