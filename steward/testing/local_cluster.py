"""A real cluster for tests: `steward up` as a process on its own data and port, and its ways in.

For tests of agents and of clients as well as for Steward's own. `LocalCluster.start`
returns at once, `wait_ready` when the URL is printed, `end` leaves no process behind. It
is a black box: what it knows is `cluster.json`, the command line, and the ops ports.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from steward.testing.waiting import wait_for

STEWARD = Path(sys.executable).with_name("steward")
READY_S = 45.0
HEALED_S = 45.0
STOP_S = 15.0
LOG_TAIL = 4000


@dataclass
class LocalCluster:
    """A `steward up` that was started."""

    data: Path
    port: int
    up: "subprocess.Popen[str]"
    output: Path

    @classmethod
    def start(
        cls,
        directory: Path,
        *options: str,
        data: Path | None = None,
        port: int | None = None,
        edges: int = 1,
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """Start one, without waiting. Its data and output are in `directory` unless `data` says.

        `environ` is added to the environment.
        """
        data = data or directory / "data"
        port = port or free_ports(edges)
        output = directory / f"up-{sum(1 for _ in directory.glob('up-*.err'))}"
        command = [str(STEWARD), "up", "--data", str(data), "--port", str(port)]
        with output.open("w") as out, output.with_suffix(".err").open("w") as err:
            up = subprocess.Popen(
                [*command, "--edges", str(edges), *options],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                cwd=cwd,
                env={**os.environ, **(environ or {})},
                start_new_session=True,
            )
        return cls(data, port, up, output)

    def wait_ready(self) -> Self:
        """Returns when the URL is printed; fails with what was printed instead."""
        wait_for(
            lambda: self.printed() or self.up.poll() is not None, READY_S, "the URL is printed"
        )
        assert self.printed(), f"steward up ended with {self.up.returncode}:\n{self.said()}"
        return self

    def wait_healed(self) -> Self:
        """Returns when no process is missing and all are ready: `up` repairs what died."""
        wait_for(self.all_ready, HEALED_S, "every process is ready again")
        return self

    def end(self) -> None:
        """Kill what runs. Safe to call twice."""
        if self.up.poll() is None:
            # The kernel kills the children of a killed supervisor.
            self.up.kill()
        self.up.wait(STOP_S)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Stop `up` by a signal; its exit code. Fails when it takes too long."""
        self.up.send_signal(number)
        return self.up.wait(STOP_S)

    # What it says

    def printed(self) -> str:
        """Its stdout so far."""
        return self.output.read_text()

    def said(self) -> str:
        """Its stderr so far."""
        return self.output.with_suffix(".err").read_text()

    def logs(self) -> str:
        """The ends of all logs, for a person who looks at a failure."""
        parts = [f"-- steward up --\n{self.said()}"]
        for log in sorted((self.data / "logs").glob("*.log")):
            parts.append(f"-- {log.name} --\n{log.read_text(errors='replace')[-LOG_TAIL:]}")
        return "\n".join(parts)

    @property
    def file(self) -> dict[str, Any]:
        """The content of cluster.json."""
        content: dict[str, Any] = json.loads((self.data / "cluster.json").read_bytes())
        return content

    @property
    def url(self) -> str:
        """The URL of the first edge."""
        return str(self.file["url"])

    @property
    def urls(self) -> list[str]:
        """The URLs of all edges."""
        return [f"http://{entry['http']}" for entry in self.file["processes"] if entry["http"]]

    @property
    def login_code(self) -> str:
        """The one-use code of the printed URL."""
        return self.printed().strip().rpartition("#login=")[2]

    @property
    def processes(self) -> dict[str, dict[str, Any]]:
        """Id → entry of cluster.json."""
        return {entry["id"]: entry for entry in self.file["processes"]}

    # What can be done with it

    def token(self, user: str, *options: str) -> str:
        """A token by `steward token`."""
        return self.steward("token", "--user", user, *options).stdout.strip()

    def steward(self, command: str, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run `steward COMMAND --data … words`; fails unless the exit code is 0."""
        answer = self.try_steward(command, *words)
        assert answer.returncode == 0, answer.stderr
        return answer

    def try_steward(self, command: str, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run `steward COMMAND --data … words`, whatever becomes of it."""
        return subprocess.run(
            [STEWARD, command, "--data", str(self.data), *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def kill(self, process_id: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a process by its id; its pid."""
        pid = int(self.processes[process_id]["pid"])
        os.kill(pid, number)
        return pid

    def metric(self, name: str, *processes: str) -> float:
        """The sum of a metric over its labels, and over these processes (default: all)."""
        total = 0.0
        for process_id in processes or self.processes:
            for line in self.metrics(process_id).splitlines():
                if line.startswith((f"{name} ", f"{name}{{")):
                    total += float(line.rpartition(" ")[2])
        return total

    def metrics(self, process_id: str) -> str:
        """The text of /metrics of a process."""
        url = f"http://{self.processes[process_id]['ops']}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())

    def pids(self) -> list[int]:
        return [entry["pid"] for entry in self.processes.values()]

    def all_ready(self) -> bool:
        """Whether every process runs and says that it is ready."""
        entries = self.processes.values()
        return all(is_running(entry["pid"]) and is_ready(entry["ops"]) for entry in entries)

    def left(self, pids: list[int]) -> list[int]:
        """Those of `pids` that are still running."""
        return [pid for pid in pids if is_running(pid)]


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
        held: list[socket.socket] = []
        try:
            held.append(socket.create_server(("127.0.0.1", 0)))
            first = int(held[0].getsockname()[1])
            for i in range(1, count):
                held.append(socket.create_server(("127.0.0.1", first + i)))
        except (OSError, OverflowError):
            continue
        else:
            return first
        finally:
            for holder in held:
                holder.close()
    raise AssertionError("no free ports")
