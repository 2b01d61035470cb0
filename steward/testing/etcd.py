"""A real etcd for tests: members on loopback, which can be paused, killed and started again.

It needs the programs `etcd` and `etcdctl` (Debian: etcd-server, etcd-client); `missing()` says
what is not there. Ports are free ones, data is where the caller says, and no process is left
behind: members die with the process that started them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from steward.testing.etcd_network import Network
from steward.testing.local_cluster import free_ports
from steward.testing.waiting import wait_for

READY_S = 30.0
STOP_S = 10.0
CONTROL_S = 30.0
# Not in the child of a fork: that runs the fork handlers of gRPC, which may never come back.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
# AlarmRequest(action=ACTIVATE, alarm=NOSPACE), which etcdctl has no command for.
_NO_SPACE = b"\x08\x01\x18\x01"
SKIPPED = "skipped: no etcd (Debian: etcd-server and etcd-client)"


def missing() -> str:
    """Why no etcd can be started here; empty when one can."""
    absent = [name for name in ("etcd", "etcdctl") if shutil.which(name) is None]
    return f"{SKIPPED}: {' and '.join(absent)}" if absent else ""


class EtcdMember:
    """One member: its process, its ports, its directory."""

    def __init__(
        self,
        name: str,
        directory: Path,
        options: Sequence[str],
        scheme: str,
        command: Sequence[str],
    ) -> None:
        self.name = name
        self.host = "127.0.0.1"
        self.directory = directory
        self.client_port = free_ports(3)
        self.peer_port = self.client_port + 1
        self.metrics_port = self.client_port + 2
        self.process: subprocess.Popen[bytes] | None = None
        self._options = list(options)
        self._scheme = scheme
        self._command = list(command)

    def move_to(self, host: str, command: Sequence[str]) -> None:
        """Run on another host, by means of this command."""
        self.host = host
        self._command = [*command, *self._command]

    @property
    def endpoint(self) -> str:
        return f"{self.host}:{self.client_port}"

    @property
    def peer_url(self) -> str:
        return f"http://{self.host}:{self.peer_port}"

    def start(self, cluster: str, state: str = "new") -> None:
        """Start it, without waiting; its data is kept from one start to the next."""
        client = f"{self._scheme}://{self.endpoint}"
        command = [
            *self._command,
            f"--name={self.name}",
            f"--data-dir={self.directory / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={self.peer_url}",
            f"--initial-advertise-peer-urls={self.peer_url}",
            f"--listen-metrics-urls=http://{self.host}:{self.metrics_port}",
            f"--initial-cluster={cluster}",
            f"--initial-cluster-state={state}",
            "--heartbeat-interval=50",
            "--election-timeout=500",
            "--log-level=warn",
            *self._options,
        ]
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "output").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-c", _DIE_WITH_PARENT, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def add_options(self, *options: str) -> None:
        """For its next start; the last of equal ones counts."""
        self._options += options

    def healthy(self) -> bool:
        """Whether it serves, with a leader."""
        try:
            url = f"http://{self.host}:{self.metrics_port}/health"
            with urllib.request.urlopen(url, timeout=2) as answer:
                return str(json.load(answer)["health"]) == "true"
        except (OSError, urllib.error.HTTPError, ValueError):
            return False

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """At once, as when the machine goes away; a paused one too. Safe to call twice."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_S)
            self.process = None

    def said(self) -> str:
        return (self.directory / "output").read_text(errors="replace")[-4000:]


class EtcdCluster:
    """Members that were started together. Use as a context manager; `start` waits for health.

    `options` go to every member; with `tls` clients must come by TLS (those options say how).
    `program` is the server that runs: the one that is installed, or a path. With a `network` each
    member is on a host of it.
    """

    def __init__(
        self,
        directory: Path,
        size: int = 3,
        options: Sequence[str] = (),
        tls: bool = False,
        program: str = "etcd",
        network: Network | None = None,
    ) -> None:
        scheme = "https" if tls else "http"
        self.members: list[EtcdMember] = []
        for number in range(size):
            name = f"m{number}"
            member = EtcdMember(name, directory / name, options, scheme, [program])
            if network is not None:
                member.move_to(network.address(number), network.command(number))
            self.members.append(member)
        self._scheme = scheme
        self._control: list[str] = []

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(member.endpoint for member in self.members)

    @property
    def initial(self) -> str:
        return ",".join(f"{member.name}={member.peer_url}" for member in self.members)

    def start(self) -> Self:
        self.launch()
        self.wait_healthy()
        return self

    def launch(self) -> None:
        """Start all members, without waiting."""
        for member in self.members:
            member.start(self.initial)

    def restart(self, member: EtcdMember) -> None:
        """Start a member that was killed, with the data that it had; does not wait."""
        member.start(self.initial, "existing")

    def wait_healthy(self, members: Sequence[EtcdMember] = ()) -> None:
        wanted = members or [each for each in self.members if each.process is not None]
        try:
            wait_for(lambda: all(each.healthy() for each in wanted), READY_S, "etcd is healthy")
        except TimeoutError as error:
            said = "\n".join(each.said() for each in wanted)
            raise TimeoutError(f"{error}:\n{said}") from None

    def leader(self, but: EtcdMember | None = None) -> EtcdMember:
        """The member that leads now, of those that are asked: all `but` one that is cut off."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            for member in self.members:
                if member.process is None or member is but:
                    continue
                status = self._status(member)
                if status is not None and status["header"]["member_id"] == status["leader"]:
                    return member
        raise TimeoutError("no member of etcd leads")

    def _status(self, member: EtcdMember) -> dict[str, Any] | None:
        try:
            text = self.control(
                "endpoint", "status", "-w", "json", endpoints=(member.endpoint,), timeout_s=3
            )
        except subprocess.SubprocessError:
            return None
        status: dict[str, Any] = json.loads(text)[0]["Status"]
        return status

    def use_control(self, *options: str) -> None:
        """Options that `control` needs from now on: `--user`, files of TLS."""
        self._control = list(options)

    def control(
        self, *arguments: str, endpoints: Sequence[str] = (), timeout_s: float = CONTROL_S
    ) -> str:
        """Run `etcdctl`; returns what it printed. Raises CalledProcessError."""
        urls = ",".join(f"{self._scheme}://{each}" for each in endpoints or self.endpoints)
        done = subprocess.run(
            ["etcdctl", f"--endpoints={urls}", *self._control, *arguments],
            env={**os.environ, "ETCDCTL_API": "3"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
        return done.stdout

    def be_full(self) -> None:
        """The state in which a full disk quota leaves etcd, until `control("alarm", "disarm")`."""
        with grpc.insecure_channel(self.endpoints[0]) as channel:
            call: Any = channel.unary_unary
            call("/etcdserverpb.Maintenance/Alarm")(_NO_SPACE, timeout=CONTROL_S)

    def save(self, path: Path) -> None:
        """A backup of all that is there, as operators take it."""
        self.control("snapshot", "save", str(path), endpoints=self.endpoints[:1])

    def put_back(self, path: Path) -> None:
        """Stop all members and start them with what was saved, as operators restore it."""
        self.stop()
        for member in self.members:
            shutil.rmtree(member.directory / "data")
            self.control(
                "snapshot",
                "restore",
                str(path),
                f"--name={member.name}",
                f"--data-dir={member.directory / 'data'}",
                f"--initial-cluster={self.initial}",
                f"--initial-advertise-peer-urls={member.peer_url}",
            )
        self.start()

    def stop(self) -> None:
        """Kill all members. Safe to call twice."""
        for member in self.members:
            member.kill()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
