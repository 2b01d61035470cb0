"""`steward up` as people meet it: ready, stopped, refused, repaired, and gone when it is killed."""

import json
import os
import pty
import select
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from steward.testing.local_cluster import is_ready, is_running
from steward.testing.waiting import wait_for

SHAPE = {"role", "id", "pid", "grpc", "http", "ops"}


def test_when_the_url_is_printed_everything_is_ready(cluster: Any) -> None:
    url, _, code = cluster.printed().strip().partition("/#login=")
    assert url == cluster.url == f"http://127.0.0.1:{cluster.port}"
    assert code
    assert cluster.file["pid"] == cluster.up.pid
    assert [(entry["role"], entry["id"]) for entry in cluster.file["processes"]] == [
        ("registry", "registry"),
        ("auth", "auth"),
        ("log", "log"),
        ("agent", "node-0"),
        ("agent", "node-1"),
        ("edge", "edge-0"),
    ]
    for entry in cluster.file["processes"]:
        assert set(entry) == SHAPE
        assert is_running(entry["pid"])
        assert is_ready(entry["ops"])
    with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
        assert answer.status == 200


def test_ctrl_c_drains_and_stops_within_10_s_with_exit_code_0(cluster: Any) -> None:
    pids = cluster.pids()
    began = time.monotonic()
    assert cluster.stop(signal.SIGINT) == 0
    assert time.monotonic() - began < 10
    assert cluster.left(pids) == []
    assert not (cluster.data / "cluster.json").exists()
    assert "killed" not in cluster.said()


def test_a_second_ctrl_c_stops_at_once(cluster: Any) -> None:
    pids = cluster.pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    cluster.up.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping" in cluster.said(), 5, "it says that it stops")
    began = time.monotonic()
    assert cluster.stop(signal.SIGINT) == 130
    assert time.monotonic() - began < 2
    assert cluster.left(pids) == []


def test_a_second_up_on_the_same_data_is_refused(cluster: Any, start_cluster: Any) -> None:
    second = start_cluster(data=cluster.data)
    assert second.up.wait(15) == 2
    assert second.printed() == ""
    assert second.said().count("\n") == 1
    assert f"in use by another `steward up` (pid {cluster.up.pid})" in second.said()
    assert cluster.left(cluster.pids()) == cluster.pids()


def test_a_port_in_use_is_refused(start_cluster: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused = start_cluster(port=port)
        assert refused.up.wait(15) == 2
    assert refused.printed() == ""
    assert refused.said().count("\n") == 1
    assert f"port 127.0.0.1:{port} is in use" in refused.said()


def test_a_data_directory_that_can_not_be_written_is_refused(
    start_cluster: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    refused = start_cluster(data=tmp_path / "file" / "data")
    assert refused.up.wait(15) == 2
    assert refused.said().count("\n") == 1


@pytest.mark.parametrize("agent", ["nowhere.py:answer", "json:no_such_thing"])
def test_an_agent_that_can_not_be_loaded_is_refused_by_name(start_cluster: Any, agent: str) -> None:
    refused = start_cluster("--agent", agent)
    assert refused.up.wait(30) == 2
    assert refused.printed() == ""
    # The last word, and nothing about a stop that nobody asked for after it.
    assert refused.said().splitlines()[-1].startswith(f"steward: agent {agent}: ")
    assert not (refused.data / "cluster.json").exists()


def test_two_clusters_need_only_other_data_and_another_port(
    cluster: Any, start_cluster: Any, tmp_path: Path
) -> None:
    other = start_cluster("--agents", "1", data=tmp_path / "other").wait_ready()
    assert other.url != cluster.url
    assert cluster.all_ready()
    assert other.all_ready()


def test_a_killed_node_comes_back_under_its_id_with_another_pid(cluster: Any) -> None:
    before = cluster.processes["node-0"]
    cluster.kill("node-0")
    wait_for(
        lambda: cluster.processes["node-0"]["pid"] != before["pid"], 20, "cluster.json is rewritten"
    )
    after = cluster.processes["node-0"]
    assert {**after, "pid": 0} == {**before, "pid": 0}
    assert is_ready(after["ops"])
    nodes = json.loads(cluster.steward("status", "--json").stdout)["nodes"]
    assert sorted(node["node_id"] for node in nodes) == ["node-0", "node-1"]


def test_each_killed_process_is_replaced_and_all_are_ready_again(cluster: Any) -> None:
    for process_id in ("registry", "auth", "log", "edge-0"):
        before = cluster.kill(process_id)
        wait_for(
            lambda killed=process_id, pid=before: cluster.processes[killed]["pid"] != pid,
            20,
            f"cluster.json has a new {process_id}",
        )
    assert wait_for(cluster.all_ready, 20, "all are ready again")


def test_when_up_is_killed_its_children_die(cluster: Any) -> None:
    pids = cluster.pids()
    cluster.up.kill()
    cluster.up.wait(5)
    assert wait_for(lambda: not cluster.left(pids), 5, "all children are dead")


def test_a_killed_cluster_starts_again_on_its_data(cluster: Any, start_cluster: Any) -> None:
    cluster.up.kill()
    cluster.up.wait(5)
    again = start_cluster(data=cluster.data).wait_ready()
    assert again.file["pid"] == again.up.pid


def test_make_run_ends_well_when_ctrl_c_is_typed_in_its_terminal(
    tmp_path: Path, free_port: int
) -> None:
    """`make` would die of the Ctrl-C itself, if it got it."""
    steward = Path(sys.executable).with_name("steward")
    (tmp_path / "Makefile").write_text(
        f"run:\n\t@exec {steward} up --data {tmp_path}/data --port {free_port} --agents 1\n"
    )
    child, terminal = pty.fork()
    if child == 0:
        os.execvp("make", ["make", "-C", str(tmp_path), "run"])
    seen = read_until(terminal, b"Ctrl-C drains and stops", 45)
    assert b"#login=" in seen
    os.write(terminal, b"\x03")
    seen += read_until(terminal, None, 15)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, seen.decode(errors="replace")
    assert b"***" not in seen


def read_until(terminal: int, text: bytes | None, deadline_s: float) -> bytes:
    """What a terminal shows until `text` comes, or until it is closed."""
    until = time.monotonic() + deadline_s
    seen = b""
    while (text is None or text not in seen) and time.monotonic() < until:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            chunk = os.read(terminal, 65536)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    return seen
