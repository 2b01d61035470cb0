"""Where the processes of a running cluster are: `<data>/cluster.json`.

Written by `steward up` alone, whole, by an atomic rename: a reader sees one state or
another, never half of one. It is there while a cluster runs; a supervisor that was
killed leaves it behind, so `read_cluster` checks that the supervisor is alive.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

CLUSTER_FILE = "cluster.json"
CLUSTER_NAME = "steward"


class NoCluster(Exception):
    """There is no running cluster in this data directory. Says what to do."""


@dataclass(frozen=True, slots=True)
class ProcessEntry:
    """One process. Addresses are `host:port`, None where there is none."""

    role: str
    id: str
    pid: int
    grpc: str | None
    http: str | None
    ops: str | None


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """The content of `cluster.json`. `pid` is the supervisor's, `url` that of the first edge."""

    pid: int
    url: str
    processes: tuple[ProcessEntry, ...]

    def address(self, role: str) -> str:
        """gRPC address of the first process of a role. Raises NoCluster when there is none."""
        for entry in self.processes:
            if entry.role == role and entry.grpc is not None:
                return entry.grpc
        raise NoCluster(f"this cluster has no {role}")


def read_cluster(data: Path) -> ClusterFile:
    """The cluster that runs on `data`. Raises NoCluster, also for a file left by a dead one."""
    path = data / CLUSTER_FILE
    try:
        raw = json.loads(path.read_bytes())
        cluster = ClusterFile(
            raw["pid"], raw["url"], tuple(ProcessEntry(**entry) for entry in raw["processes"])
        )
    except FileNotFoundError:
        raise NoCluster(f"no cluster runs on {data}; start one with `steward up`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoCluster(f"{path} can't be read ({error}); is another version running?") from None
    if not _alive(cluster.pid):
        raise NoCluster(f"the cluster on {data} is dead; start it again with `steward up`")
    return cluster


def write_cluster(data: Path, cluster: ClusterFile) -> None:
    """Replace `cluster.json` by an atomic rename. Raises OSError."""
    content = json.dumps(asdict(cluster), indent=2) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=data, prefix=f".{CLUSTER_FILE}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
        os.replace(temporary, data / CLUSTER_FILE)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_cluster(data: Path) -> None:
    """Remove `cluster.json`. Safe to call twice."""
    (data / CLUSTER_FILE).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
