"""The data directory of a cluster on one machine: made, locked, and with its logs kept small.

One `steward up` at a time may use a directory: it holds an flock on `<data>/up.lock`,
which the kernel releases however the process ends. Children's output is in
`<data>/logs/<id>.log`; at each start of the cluster the former one becomes `.log.1`, and so
it does when it has grown over 32 MiB.
"""

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

LOCK_FILE = "up.lock"
LOGS = "logs"
MAX_LOG_BYTES = 32 * 1024 * 1024


class DataDirectoryUnusable(Exception):
    """The directory can't be used. One line that says what to do."""


class DataDirectory:
    """Holds the lock inside of a `with` block. Raises DataDirectoryUnusable on entering."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / LOGS
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise DataDirectoryUnusable(
                f"data directory {self.path} can't be used: {error.strerror}; give another --data"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise DataDirectoryUnusable(
                f"{self.path} is in use by another `steward up` (pid {holder}); "
                "stop it, or give another --data"
            ) from None
        self._lock = lock
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            for log in self.logs.glob("*.log"):
                log.replace(log.with_suffix(".log.1"))
        except OSError as error:
            self._release()
            raise DataDirectoryUnusable(
                f"data directory {self.path} can't be written: {error.strerror}"
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release()

    def log_of(self, process_id: str) -> Path:
        """The file that takes the output of a process."""
        return self.logs / f"{process_id}.log"

    def cut_logs(self, max_bytes: int = MAX_LOG_BYTES) -> None:
        """Copy each log that is over `max_bytes` to `.log.1` and empty it; it may be open."""
        for log in self.logs.glob("*.log"):
            if log.stat().st_size > max_bytes:
                shutil.copyfile(log, log.with_suffix(".log.1"))
                os.truncate(log, 0)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
