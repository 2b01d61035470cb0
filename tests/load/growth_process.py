"""One process of the product on free ports, for measuring: how long it takes until it is ready."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from steward.testing.local_cluster import free_ports, is_ready

START_S = 60.0
POLL_S = 0.005


class OneProcess:
    """`python -m MODULE --data DATA`, started on entry, killed at exit (no clean end)."""

    def __init__(self, module: str, data: Path, *options: str) -> None:
        first = free_ports(2)
        self.address = f"127.0.0.1:{first}"
        self._ops = f"127.0.0.1:{first + 1}"
        self._command = [
            sys.executable,
            *("-m", module, "--data", str(data), "--parent-pid", str(os.getpid())),
            *("--grpc-port", str(first), "--ops-port", str(first + 1), *options),
        ]
        self.ready_s = 0.0

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        """Returns when /readyz says so; `ready_s` is how long that took."""
        began = time.monotonic()
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        while not is_ready(self._ops):
            ended = self._process.poll()
            if ended is not None or time.monotonic() - began > START_S:
                self._end()
                raise AssertionError(f"{self._command} is not ready; exit code {ended}")
            time.sleep(POLL_S)
        self.ready_s = time.monotonic() - began
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
