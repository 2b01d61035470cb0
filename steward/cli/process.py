"""One child process: started in a session of its own, watched by pidfd, reaped with its group.

A session of its own keeps the terminal's Ctrl-C away: the supervisor alone gets it and
stops the children in order. The kernel's pidfd says within a millisecond that a process
is dead. What it started (a tool, an MCP server) is killed with it, before it is reaped:
until then its process group can't have become somebody else's.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

KEPT_LINES = 12
TAIL_BYTES = 8192


class Process:
    """A running or ended child. Made by `spawn`, inside a running event loop."""

    def __init__(self, popen: "subprocess.Popen[bytes]", log: Path, log_offset: int) -> None:
        self._popen = popen
        self._log = log
        self._log_offset = log_offset
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pidfd = os.pidfd_open(popen.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_death)

    @classmethod
    def spawn(cls, command: Sequence[str], log: Path, environ: Mapping[str, str]) -> "Process":
        """Start `command` with its output appended to `log`. Raises OSError."""
        # The log is opened for appending, so that it may be cut while it is written.
        with log.open("ab") as output:
            offset = output.tell()
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environ),
                start_new_session=True,
            )
        return cls(popen, log, offset)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return not self._ended.done()

    async def wait(self) -> int:
        """The exit code, negative for a signal, once the process is reaped."""
        return await asyncio.shield(self._ended)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, SIGKILL to its whole group. Nothing happens when it has ended."""
        if not self.alive:
            return
        with suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    def step_back(self) -> None:
        """Let the others go first, until `step_up`: its session gets less of the processors.

        By the scheduler's groups of sessions, which may be favoured again without being root
        (a nice value may not). Where the kernel has no such groups nothing happens.
        """
        self._favour(10)

    def step_up(self) -> None:
        self._favour(0)

    def _favour(self, nice: int) -> None:
        with suppress(OSError):
            Path(f"/proc/{self.pid}/autogroup").write_text(str(nice))

    def last_words(self) -> list[str]:
        """The last lines that it wrote to its log, at most twelve."""
        try:
            with self._log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                # A log that was cut meanwhile is shorter than where we began.
                file.seek(max(min(self._log_offset, size), size - TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()][-KEPT_LINES:]

    def _on_death(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._ended.set_result(self._popen.wait())
