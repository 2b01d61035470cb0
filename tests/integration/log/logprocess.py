"""A real log process on free ports, for tests and the benchmark: start, kill -9, start again."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp

START_S = 15.0


async def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Return when `condition` holds; TimeoutError when it did not within the time."""
    async with asyncio.timeout(within_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class LogChild:
    """`python -m agent_service.log` over `data`, always on the same ports."""

    def __init__(self, data: Path, *options: str) -> None:
        self.data = data
        self.grpc_port = free_port()
        self.ops_port = free_port()
        self._options = options
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    async def spawn(self) -> asyncio.subprocess.Process:
        """Start the process, whether or not it comes up."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "agent_service.log",
            *("--data", str(self.data)),
            *("--grpc-port", str(self.grpc_port)),
            *("--ops-port", str(self.ops_port)),
            *("--parent-pid", str(os.getpid())),
            *self._options,
            stderr=asyncio.subprocess.PIPE,
        )
        return self._process

    async def start(self) -> None:
        """Start the process and wait until it says that it is ready."""
        process = await self.spawn()
        url = f"http://127.0.0.1:{self.ops_port}/readyz"
        async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
            while True:
                assert process.returncode is None, await self.errors()
                try:
                    async with session.get(url) as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.02)

    async def errors(self) -> str:
        """What an ended process wrote to stderr."""
        assert self._process is not None
        assert self._process.stderr is not None
        return (await self._process.stderr.read()).decode()

    async def metrics(self) -> str:
        """The text of /metrics."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.ops_port}/metrics") as answer,
        ):
            return await answer.text()

    async def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Signal the process if it lives, and reap it. Its exit code."""
        process = self._process
        assert process is not None
        if process.returncode is None:
            process.send_signal(number)
        async with asyncio.timeout(10):
            return await process.wait()
