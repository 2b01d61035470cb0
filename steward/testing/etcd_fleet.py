"""A cluster with several registries on one etcd, each process a real one that a test may stop.

`steward up` starts one registry; this is what an operator has who starts three, each with a
directory of its own, and gives all their addresses to nodes, edges and the log. Nobody starts here
what died: the test says when. No process is left behind: all die with the one that started them.
"""

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
from typing import Self

from steward.rpc.keys import CONTROL_KEY, USER_KEY, load_or_create_key
from steward.testing.local_cluster import free_ports, is_ready
from steward.testing.waiting import wait_for

CLUSTER = "local"
HOST = "127.0.0.1"
READY_S = 45.0
STOP_S = 15.0
NODES = 2
WHOLE = "a registry serves, and everybody is ready or stands by"
_LOG_TAIL = 4_000
_OTHER_PORTS = 12


class ServiceProcess:
    """One process of the fleet; started again it has its ports, its data and its log file."""

    def __init__(
        self, name: str, module: str, data: Path, log: Path, ops_port: int, options: Sequence[str]
    ) -> None:
        self.name = name
        self.data = data
        self.log = log
        self.ops = f"{HOST}:{ops_port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._command = [
            *(sys.executable, "-P", "-m", module, "--id", name, "--cluster", CLUSTER),
            *("--data", str(data), "--host", HOST, "--ops-port", str(ops_port)),
            *("--parent-pid", str(os.getpid()), *options),
        ]

    def start(self) -> None:
        """Start it, without waiting."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def ready(self) -> bool:
        """Whether it runs and says that it serves."""
        return self.running() and is_ready(self.ops)

    def stands_by(self) -> bool:
        """Whether it runs, answers, and says that it does not serve."""
        try:
            with urllib.request.urlopen(f"http://{self.ops}/readyz", timeout=2):
                return False
        except urllib.error.HTTPError as error:
            return error.code == 503
        except OSError:
            return False

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """A signal, and no waiting for what it does."""
        assert self.process is not None
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it by a signal; its exit code. Safe to call twice, and for one that stands still."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        return process.wait(STOP_S)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Fleet:
    """Registries, two nodes, the log, auth and an edge. Use as a context manager.

    `store` is the setting of the registries; `agents` are entry points of the nodes.
    """

    def __init__(
        self, directory: Path, store: str, agents: tuple[str, ...], registries: int = 3
    ) -> None:
        self.data = directory / "data"
        self._directory = directory
        load_or_create_key(self.data, CONTROL_KEY)
        load_or_create_key(self.data, USER_KEY)
        (directory / "logs").mkdir()
        # All at once: asked for one by one, a port may come twice.
        most = 2 * registries + _OTHER_PORTS
        self._ports = iter(range(free_ports(most), 65_536))
        ports = [next(self._ports) for _ in range(registries)]
        # How an operator writes it for all who need the registry.
        self.registry = registry = "ipv4:" + ",".join(f"{HOST}:{port}" for port in ports)
        self.registries: list[ServiceProcess] = []
        for number, port in enumerate(ports):
            name = f"registry-{number}"
            home = directory / name
            shutil.copytree(self.data / "keys", home / "keys")
            options = ("--store", store, "--grpc-port", str(port))
            self.registries.append(self._process(name, "registry_service", home, *options))
        door, auth, log = (next(self._ports) for _ in range(3))
        self.url = f"http://{HOST}:{door}"
        self.others = [
            self._process("auth", "auth_service", self.data, "--grpc-port", str(auth)),
            self._process(
                *("log", "agent_service.log", self.data),
                *("--grpc-port", str(log), "--registry", registry),
            ),
            *(
                self._process(
                    *(f"node-{number}", "agent_service", self.data),
                    *("--grpc-port", str(next(self._ports)), "--registry", registry),
                    *("--log", f"{HOST}:{log}", "--entrypoints", ",".join(agents)),
                )
                for number in range(NODES)
            ),
            self._process(
                *("edge-0", "edge", self.data, "--port", str(door)),
                *("--registry", registry, "--auth", f"{HOST}:{auth}"),
            ),
        ]

    def _process(self, name: str, module: str, data: Path, *options: str) -> ServiceProcess:
        log = self._directory / "logs" / f"{name}.log"
        return ServiceProcess(name, module, data, log, next(self._ports), options)

    @property
    def processes(self) -> list[ServiceProcess]:
        return [*self.registries, *self.others]

    def start(self) -> Self:
        for each in self.processes:
            each.start()
        wait_for(lambda: self.whole() or self._ended(), READY_S, WHOLE)
        if ended := self._ended():
            raise RuntimeError(f"{', '.join(ended)} ended at the start")
        return self

    def _ended(self) -> list[str]:
        return [each.name for each in self.processes if not each.running()]

    def wait_whole(self) -> None:
        """Returns when one registry serves, the others stand by, and everybody else is ready."""
        wait_for(self.whole, READY_S, WHOLE)

    def whole(self) -> bool:
        running = [each for each in self.registries if each.running()]
        serving = [each for each in running if each.ready()]
        waiting = [each for each in running if each.stands_by()]
        others = all(each.ready() for each in self.others)
        return len(serving) == 1 and len(serving) + len(waiting) == len(running) and others

    def writer(self) -> ServiceProcess:
        """The registry that serves."""
        found: list[ServiceProcess] = wait_for(
            lambda: [each for each in self.registries if each.ready()], READY_S, "one serves"
        )
        (writer,) = found
        return writer

    def until_another_serves(self, writer: ServiceProcess, within_s: float) -> float:
        """Seconds until a registry serves that is not this one."""
        began = time.monotonic()
        rest = [each for each in self.registries if each is not writer and each.running()]
        wait_for(lambda: any(map(ServiceProcess.ready, rest)), within_s, "another registry serves")
        return time.monotonic() - began

    def logs(self) -> str:
        """The ends of all logs, for a person who looks at a failure."""
        return "\n".join(
            f"-- {each.name} --\n{each.said()[-_LOG_TAIL:]}" for each in self.processes
        )

    def stop(self) -> None:
        """Kill all. Safe to call twice."""
        for each in self.processes:
            each.end(signal.SIGKILL)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException as error:
            self.stop()
            error.add_note(self.logs())
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
