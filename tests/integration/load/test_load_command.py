"""`steward load` from outside: bad input in one line, and a short real run on a real cluster."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from steward.testing.local_cluster import LocalCluster
from steward.testing.waiting import wait_for

EVENTS = "steward_log_events_total"


def steward(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [str(Path(sys.executable).with_name("steward")), "load", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    directory = tmp_path_factory.mktemp("load")
    cluster = LocalCluster.start(directory, "--agent=steward.load.agent:load", edges=2)
    try:
        yield cluster.wait_ready()
    finally:
        cluster.end()


@pytest.mark.parametrize(
    "words",
    [
        ("--users", "many"),
        ("--url", "ws://127.0.0.1:1", "--token", "t"),
        ("--url", "http://127.0.0.1:0", "--token", "t"),
        ("--url", "http://127.0.0.1:99999", "--token", "t"),
        ("--url", "http://127.0.0.1:1"),
        ("--url", "http://127.0.0.1:1", "--token", "t", "--users", "2"),
        ("--url", "http://127.0.0.1:1", "--token", "a\nb"),
        ("--url", "http://127.0.0.1:1", "--token", ""),
        ("--url", "http://127.0.0.1:1", "--tokens", "/nowhere/at/all"),
        ("--url", "http://127.0.0.1:1", "--token", "t", "--data", "/nowhere"),
        ("--url", "http://127.0.0.1:1", "--token", "t", "--seconds", "0"),
        ("--url", "http://127.0.0.1:1", "--token", "t", "--seconds", "nan"),
        ("--url", "http://127.0.0.1:1", "--token", "t", "--rate", "-1"),
        ("--url", "http://127.0.0.1:1", "--token", "t", "--workers", "0"),
        ("--url", "http://127.0.0.1:1", "--token", "t", "--tabs", "1000"),
        ("--data", "/nowhere/at/all"),
        ("--data", ""),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(words: tuple[str, ...]) -> None:
    answer = steward(*words)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("steward: ")
    assert answer.stderr.count("\n") == 1


def test_nobody_at_the_url_is_a_failure_in_words() -> None:
    answer = steward("--url", "http://127.0.0.1:1", "--token", "t")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "steward: " in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.parametrize("words", [("--users", "0"), ("--users", "100001"), ("--token", "t")])
def test_wrong_use_with_a_cluster_is_seen_before_anything_is_sent(
    cluster: LocalCluster, words: tuple[str, ...]
) -> None:
    answer = steward("--data", str(cluster.data), *words)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.count("\n") == 1


def test_a_run_at_a_rate_brings_every_event_to_every_tab(cluster: LocalCluster) -> None:
    words = ("--users", "6", "--tabs", "3", "--rate", "120", "--seconds", "1", "--workers", "2")
    answer = steward("--data", str(cluster.data), *words, "--json")
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    # 20 events of each user, and its message, the start, the thought and the end of its run.
    assert found["events"] == 6 * 24
    assert found["frames"] == 6 * 24 * 3
    assert (found["connections"], found["edges"], found["workers"]) == (18, 2, 2)
    assert (
        0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p99"] <= found["latency_ms"]["max"]
    )
    assert found["cpu_us_per_event"].keys() == cluster.processes.keys()
    assert all(cost > 0 for cost in found["cpu_us_per_event"].values())


def test_as_many_as_they_can_is_more_than_a_rate(cluster: LocalCluster) -> None:
    answer = steward("--data", str(cluster.data), "--users", "2", "--seconds", "0.5")
    assert answer.returncode == 0, answer.stderr
    events = re.search(r"durable events +([0-9,]+) in", answer.stdout)
    assert events is not None, answer.stdout
    assert int(events[1].replace(",", "")) > 500


def test_tokens_are_users_of_a_cluster_that_is_named_by_its_url(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("\n".join(cluster.token(user) for user in ("alice", "bob")))
    words = ("--tokens", str(tokens), "--token", cluster.token("carol"), "--rate", "30")
    answer = steward("--url", cluster.url, *words, "--seconds", "0.5", "--json")
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["users"] == 3
    assert found["cpu_us_per_event"] == {}


def test_a_refused_token_is_a_failure_in_words(cluster: LocalCluster) -> None:
    answer = steward("--url", cluster.url, "--token", "nonsense")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "401" in answer.stderr and "Traceback" not in answer.stderr


def test_an_agent_that_is_not_there_is_a_failure_that_says_so(cluster: LocalCluster) -> None:
    answer = steward("--data", str(cluster.data), "--users", "1", "--agent", "nobody")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "NOT_FOUND" in answer.stderr


def test_a_connection_that_is_lost_on_the_way_is_a_failure_without_a_figure(
    cluster: LocalCluster,
) -> None:
    before = cluster.metric(EVENTS)
    script = str(Path(sys.executable).with_name("steward"))
    command = [script, "load", "--data", str(cluster.data), "--rate", "200", "--seconds", "60"]
    load = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: cluster.metric(EVENTS) > before + 200, 60, "the load goes on")
        cluster.kill("edge-1")
        out, err = load.communicate(timeout=60)
    finally:
        load.kill()
        load.wait()
    assert (load.returncode, out) == (1, "")
    assert "ended" in err and "Traceback" not in err
