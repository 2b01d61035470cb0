"""Which processes a cluster on one machine has, where they listen, and how they are started.

Pure but for the ports, which are reserved as they are given out. Addresses of peers and
ids go on each command line, so the environment can't send a process elsewhere; a port
that is set there (`STEWARD_AGENT_OPS_PORT=9080`) is used, plus i for the i-th of its role.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from steward.cli.cluster_file import CLUSTER_NAME
from steward.cli.datadir import DataDirectory
from steward.cli.ports import PortReservations
from steward.cli.supervisor import ProcessSpec
from steward.config.settings import env_name

HOST = "127.0.0.1"
DEFAULT_PORT = 8080
MOST_OF_A_ROLE = 64

MODULES: Mapping[str, str] = {
    "registry": "registry_service",
    "auth": "auth_service",
    "log": "agent_service.log",
    "agent": "agent_service",
    "edge": "edge",
}
"""The module that `python -m` runs for each role."""


class LayoutError(Exception):
    """Options that make no cluster. One line."""


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What to start. `port` None takes the setting of the edge, else 8080."""

    agents: int
    edges: int
    port: int | None
    entrypoints: tuple[str, ...]


def lay_out(
    plan: ClusterPlan,
    directory: DataDirectory,
    ports: PortReservations,
    environ: Mapping[str, str],
) -> tuple[ProcessSpec, ...]:
    """The processes, peers before those who call them.

    Raises LayoutError for impossible numbers and PortInUse for ports that can't be had.
    """
    _check(plan)
    layout = _Layout(directory, ports, environ)
    # The ports that people know come first: the ones below are free ones, and must not
    # take them by chance.
    first = plan.port if plan.port is not None else layout.set_port("edge", "port") or DEFAULT_PORT
    if not 1 <= first <= 65536 - plan.edges:
        raise LayoutError(f"--port {first}: ports are 1 to 65535")
    doors = [f"{HOST}:{ports.reserve(first + i)}" for i in range(plan.edges)]
    registry = layout.add("registry", "registry")
    auth = layout.add("auth", "auth")
    log = layout.add("log", "log", 0, "--registry", registry)
    for i in range(plan.agents):
        peers = ["--registry", registry, "--log", log]
        if plan.entrypoints:
            peers += ["--entrypoints", ",".join(plan.entrypoints)]
        layout.add("agent", f"node-{i}", i, *peers)
    for i, door in enumerate(doors):
        layout.add_edge(f"edge-{i}", i, door, "--registry", registry, "--auth", auth)
    return tuple(layout.specs)


def _check(plan: ClusterPlan) -> None:
    for name, count in (("agents", plan.agents), ("edges", plan.edges)):
        if not 1 <= count <= MOST_OF_A_ROLE:
            raise LayoutError(f"--{name} {count}: 1 to {MOST_OF_A_ROLE} are possible")
    for entrypoint in plan.entrypoints:
        if ":" not in entrypoint or "," in entrypoint or not entrypoint.isprintable():
            raise LayoutError(
                f"--agent {entrypoint!r}: write FILE.py:NAME or MODULE:NAME, without commas"
            )


class _Layout:
    def __init__(
        self, directory: DataDirectory, ports: PortReservations, environ: Mapping[str, str]
    ) -> None:
        self.specs: list[ProcessSpec] = []
        self._directory = directory
        self._ports = ports
        self._environ = environ

    def set_port(self, role: str, field: str) -> int:
        """The port that the environment sets, or 0."""
        name = env_name(role, field)
        text = self._environ.get(name, "0")
        if not text.isdecimal() or int(text) > 65535:
            raise LayoutError(f"{name}: {text!r} is not a port")
        return int(text)

    def add(self, role: str, process_id: str, index: int = 0, *more: str) -> str:
        """Add a process with a gRPC server; the address of that."""
        grpc = self._address(role, "grpc_port", index)
        self._append(role, process_id, index, grpc, None, "--grpc-port", _port(grpc), *more)
        return grpc

    def add_edge(self, process_id: str, index: int, http: str, *more: str) -> None:
        """Add an edge, which serves HTTP and no gRPC."""
        self._append("edge", process_id, index, None, http, "--port", _port(http), *more)

    def _append(
        self,
        role: str,
        process_id: str,
        index: int,
        grpc: str | None,
        http: str | None,
        *more: str,
    ) -> None:
        ops = self._address(role, "ops_port", index)
        command = (
            *service_command(role),
            *("--id", process_id, "--cluster", CLUSTER_NAME, "--data", str(self._directory.path)),
            *("--host", HOST, "--ops-port", _port(ops), "--parent-pid", str(os.getpid())),
            *more,
        )
        log = self._directory.log_of(process_id)
        self.specs.append(ProcessSpec(role, process_id, command, grpc, http, ops, log))

    def _address(self, role: str, field: str, index: int) -> str:
        port = self.set_port(role, field)
        return f"{HOST}:{self._ports.reserve(port + index if port else 0)}"


def service_command(role: str) -> tuple[str, ...]:
    """How the service of a role is started, without its settings.

    `-P` keeps the working directory off the import path: a folder `edge` there must not
    stand in for the service.
    """
    return sys.executable, "-P", "-m", MODULES[role]


def _port(address: str) -> str:
    return address.rpartition(":")[2]


def data_path(text: str) -> Path:
    """The type of a `--data` option: absolute, so that it means the same in every process.

    An empty one, as an unset variable makes it, is refused: it would be the working directory.
    """
    if not text:
        raise argparse.ArgumentTypeError("the directory is empty")
    return Path(text).absolute()
