"""A real cluster for the end-to-end tests: `steward up`, on its own data and port, cleaned up.

`cluster` is one with the default processes; `start_cluster` starts one with other options, or
one that is meant to fail. The logs of all processes are shown when a test fails.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from steward.cli.ports import PortInUse, PortReservations

STEWARD = Path(sys.executable).with_name("steward")
READY_S = 45.0
STOP_S = 15.0
LOG_TAIL = 4000


def wait_for(condition: Callable[[], Any], deadline_s: float, what: str) -> Any:
    """Poll until `condition` gives something true, and return that; fails after the deadline."""
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {deadline_s:.0f} s: {what}")


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def is_ready(ops: str) -> bool:
    """Whether /readyz at `host:port` says so."""
    try:
        with urllib.request.urlopen(f"http://{ops}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that are free now."""
    for _ in range(50):
        reservations = PortReservations()
        try:
            first = reservations.reserve()
            for i in range(1, count):
                reservations.reserve(first + i)
        except PortInUse:
            continue
        else:
            return first
        finally:
            reservations.close()
    raise AssertionError("no free ports")


@pytest.fixture
def free_port() -> int:
    """A port that was free a moment ago."""
    return free_ports(1)


@dataclass
class Cluster:
    """A `steward up` that was started; `wait_ready` before using the rest."""

    data: Path
    port: int
    up: "subprocess.Popen[str]"
    output: Path

    wait_for = staticmethod(wait_for)
    is_running = staticmethod(is_running)
    is_ready = staticmethod(is_ready)

    def wait_ready(self) -> "Cluster":
        """Returns when the URL is printed; fails with what was printed instead."""
        wait_for(
            lambda: self.printed() or self.up.poll() is not None, READY_S, "the URL is printed"
        )
        assert self.printed(), f"steward up ended with {self.up.returncode}:\n{self.said()}"
        return self

    def printed(self) -> str:
        """Its stdout so far."""
        return self.output.read_text()

    def said(self) -> str:
        """Its stderr so far."""
        return self.output.with_suffix(".err").read_text()

    @property
    def file(self) -> dict[str, Any]:
        """The content of cluster.json."""
        content: dict[str, Any] = json.loads((self.data / "cluster.json").read_bytes())
        return content

    @property
    def url(self) -> str:
        return str(self.file["url"])

    @property
    def login_code(self) -> str:
        """The one-use code of the printed URL."""
        return self.printed().strip().rpartition("#login=")[2]

    @property
    def processes(self) -> dict[str, dict[str, Any]]:
        """Id → entry of cluster.json."""
        return {entry["id"]: entry for entry in self.file["processes"]}

    def pids(self) -> list[int]:
        return [entry["pid"] for entry in self.processes.values()]

    def token(self, user: str, *options: str) -> str:
        """A token by `steward token`."""
        return self.steward("token", "--user", user, *options).stdout.strip()

    def steward(self, command: str, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run `steward COMMAND --data … words`; fails unless the exit code is 0."""
        answer = subprocess.run(
            [STEWARD, command, "--data", str(self.data), *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr
        return answer

    def kill(self, process_id: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a process by its id; its pid."""
        pid = int(self.processes[process_id]["pid"])
        os.kill(pid, number)
        return pid

    def all_ready(self) -> bool:
        """Whether every process says that it is ready."""
        return all(is_ready(entry["ops"]) for entry in self.processes.values())

    def left(self, pids: list[int]) -> list[int]:
        """Those of `pids` that are still running."""
        return [pid for pid in pids if is_running(pid)]

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Stop `up` by a signal; its exit code. Fails when it takes too long."""
        self.up.send_signal(number)
        return self.up.wait(STOP_S)

    def logs(self) -> str:
        """The ends of all logs, for a person who looks at a failure."""
        parts = [f"-- steward up --\n{self.said()}"]
        for log in sorted((self.data / "logs").glob("*.log")):
            parts.append(f"-- {log.name} --\n{log.read_text(errors='replace')[-LOG_TAIL:]}")
        return "\n".join(parts)


StartCluster = Callable[..., Cluster]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Show the logs of the clusters of a failed test."""
    report = yield
    if report.when == "call" and report.failed:  # type: ignore[attr-defined]
        for cluster in item.stash.get(_CLUSTERS, []):
            report.sections.append(("cluster", cluster.logs()))  # type: ignore[attr-defined]
    return report


_CLUSTERS = pytest.StashKey[list[Cluster]]()


@pytest.fixture
def start_cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StartCluster]:
    """Start `steward up` with options, without waiting. After the test all of it is ended."""
    started: list[Cluster] = []
    request.node.stash[_CLUSTERS] = started

    def start(
        *options: str,
        data: Path | None = None,
        port: int | None = None,
        edges: int = 1,
        cwd: Path | None = None,
    ) -> Cluster:
        data = data or tmp_path / "data"
        port = port or free_ports(edges)
        output = tmp_path / f"up-{len(started)}"
        with output.open("w") as out, output.with_suffix(".err").open("w") as err:
            up = subprocess.Popen(
                [
                    STEWARD,
                    "up",
                    "--data",
                    str(data),
                    "--port",
                    str(port),
                    "--edges",
                    str(edges),
                    *options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                cwd=cwd,
                start_new_session=True,
            )
        cluster = Cluster(data, port, up, output)
        started.append(cluster)
        return cluster

    yield start
    for cluster in started:
        if cluster.up.poll() is None:
            # The kernel kills the children of a killed supervisor.
            cluster.up.kill()
        cluster.up.wait(STOP_S)


@pytest.fixture
def cluster(start_cluster: StartCluster) -> Cluster:
    """A running cluster: registry, auth, log, two nodes, one edge."""
    return start_cluster().wait_ready()
