"""`python -m edge` as a process: readiness, signals, exit codes."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

pytestmark = pytest.mark.asyncio


@contextlib.asynccontextmanager
async def edge_process(auth: Any, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edge", "--cluster", "edge-test", "--data", str(auth.data),
        "--auth", auth.address, "--parent-pid", str(os.getpid()), *options,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def get(url: str) -> tuple[int, str]:
    """Status and text, once somebody answers."""
    async with asyncio.timeout(10), aiohttp.ClientSession() as http:
        while True:
            try:
                async with http.get(url) as answer:
                    return answer.status, await answer.text()
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.02)


async def test_an_edge_without_a_registry_is_alive_unready_and_stops_on_sigterm(auth: Any) -> None:
    port, ops = free_port(), free_port()
    options = ("--port", str(port), "--ops-port", str(ops), "--registry", "127.0.0.1:1")
    async with edge_process(auth, *options) as process:
        assert (await get(f"http://127.0.0.1:{port}/healthz"))[0] == 200
        status, text = await get(f"http://127.0.0.1:{ops}/readyz")
        assert status == 503 and "registry" in text
        status, text = await get(f"http://127.0.0.1:{ops}/metrics")
        assert status == 200 and "steward_edge_connections" in text
        status, _ = await get(f"http://127.0.0.1:{port}/metrics")
        assert status == 404
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--heartbeat-seconds", "0"), "heartbeat_seconds"),
        (("--no-such-setting", "1"), "no-such-setting"),
        (("--allowed-origins", "example.org"), "not an origin"),
    ],
)
async def test_what_can_not_be_used_is_one_line_and_exit_code_2(
    auth: Any, options: tuple[str, ...], words: str
) -> None:
    async with edge_process(auth, *options) as process:
        async with asyncio.timeout(10):
            _, stderr = await process.communicate()
    assert process.returncode == 2 and stderr.count(b"\n") == 1 and words in stderr.decode()


async def test_a_port_in_use_is_one_line_and_exit_code_2(auth: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with edge_process(auth, "--port", str(taken.getsockname()[1])) as process:
            async with asyncio.timeout(10):
                _, stderr = await process.communicate()
    assert process.returncode == 2 and stderr.count(b"\n") == 1 and b"can't be used" in stderr
