"""A real edge process between stand-in peers and a real auth service, for measuring it alone.

`Rig` starts `python -m auth_service`, `tests.load.edge_stand` and `python -m edge` on free ports
and data of their own, and ends them. The edge runs as anywhere: tokens are verified by auth,
events come on a node's real stream, every check is on.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from steward.model.keys import DEFAULT_TENANT, UserKey
from steward.rpc.keys import USER_KEY, load_or_create_key
from steward.testing.local_cluster import free_ports
from steward.tokens import mint
from tests.load import machine
from tests.load.edge_stand import CLUSTER

READY_S = 30.0
STOP_S = 15.0
TRIES = 3
MOST_WORKERS = 4
TOKEN_S = 86_000


class Rig:
    """The processes around one edge, as a context.

    `extra` are options of the edge, `stand` those of the stand. Subclasses may name another
    module as `STAND`.
    """

    STAND = "tests.load.edge_stand"

    def __init__(self, extra: Sequence[str] = (), stand: Sequence[str] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="steward-edge-load-")
        self.data = Path(self._folder.name)
        self._key = load_or_create_key(self.data, USER_KEY)
        self._stand_options = stand
        self._processes: list[subprocess.Popen[str]] = []
        try:
            self._start_somewhere(extra)
        except BaseException:
            self.close()
            raise

    def _start_somewhere(self, extra: Sequence[str]) -> None:
        """A port that is free now may be taken a moment later: then others are tried."""
        for left in reversed(range(TRIES)):
            try:
                return self._start(extra)
            except AssertionError:
                if not left:
                    raise
                self._end_processes()

    def _start(self, extra: Sequence[str]) -> None:
        # In a row, the ops port last: workers have those behind it.
        auth_grpc = free_ports(4 + MOST_WORKERS)
        auth_ops, self.port, self.ops = auth_grpc + 1, auth_grpc + 2, auth_grpc + 3
        self.auth = self._run(
            "auth_service",
            "--id",
            "auth-1",
            "--grpc-port",
            str(auth_grpc),
            "--ops-port",
            str(auth_ops),
        )
        self._stand = self._run(self.STAND, *self._stand_options)
        assert self._stand.stdout is not None
        address = json.loads(self._stand.stdout.readline())["address"]
        self.edge = self._run(
            "edge",
            *("--id", "edge-1", "--port", str(self.port), "--ops-port", str(self.ops)),
            *("--auth", f"127.0.0.1:{auth_grpc}", "--registry", address),
            *("--max-connections-per-user", "100000", "--log-level", "warning"),
            *extra,
        )
        deadline = time.monotonic() + READY_S
        while not self._is_ready():
            if time.monotonic() > deadline or self.edge.poll() is not None:
                raise AssertionError("the edge did not get ready")
            time.sleep(0.05)

    def _run(self, module: str, *options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", module, "--data", str(self.data)]
        if module != self.STAND:
            command += ["--cluster", CLUSTER, "--parent-pid", str(os.getpid())]
        process = subprocess.Popen(
            [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._processes.append(process)
        return process

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ops}/readyz", timeout=1):
                return True
        except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError):
            return False

    def tokens(self, users: Sequence[str]) -> list[tuple[str, str]]:
        """A token for each user."""
        return [(u, mint(self._key, UserKey(DEFAULT_TENANT, u), TOKEN_S)) for u in users]

    def ask(self, **order: Any) -> dict[str, Any]:
        """Tell the stand something and wait for its answer."""
        self.tell(**order)
        return self.answer()

    def tell(self, **order: Any) -> None:
        """Tell the stand something; its answer has to be read by `answer`."""
        assert self._stand.stdin is not None
        self._stand.stdin.write(json.dumps(order) + "\n")
        self._stand.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._stand.stdout is not None
        answer: dict[str, Any] = json.loads(self._stand.stdout.readline())
        return answer

    def check(self) -> None:
        """Fails when the edge has put anything on record."""
        found = self.ask(ask=1)["violations"]
        if found:
            raise AssertionError(f"the edge reported violations: {found}")

    @contextmanager
    def cpu(self) -> "Iterator[Callable[[], float]]":
        """CPU seconds that the edge (and its workers) use within the block, asked behind it."""
        before = self._cpu_now()
        after = [before]
        yield lambda: after[0] - before
        after[0] = self._cpu_now()

    def _cpu_now(self) -> float:
        return sum(machine.cpu_seconds(pid) for pid in self.edge_pids())

    def edge_pids(self) -> list[int]:
        """The edge's process, or its workers."""
        children = Path(f"/proc/{self.edge.pid}/task/{self.edge.pid}/children").read_text().split()
        return [self.edge.pid, *map(int, children)]

    def edge_kib(self) -> int:
        return sum(machine.resident_kib(pid) for pid in self.edge_pids())

    def close(self) -> None:
        """End all processes, the edge first. Safe to call twice."""
        self._end_processes()
        self._folder.cleanup()

    def _end_processes(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._processes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
