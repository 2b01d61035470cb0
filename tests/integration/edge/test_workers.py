"""`edge --workers N`: several edges on one port, that become ready and end together."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

pytestmark = pytest.mark.asyncio
DEADLINE_S = 20.0


@contextlib.asynccontextmanager
async def parent_of_two(
    auth: Any, port: int, ops: int, registry: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edge", "--cluster", "edge-test", "--data", str(auth.data),
        "--auth", auth.address, "--registry", registry, "--id", "edge-9", "--workers", "2",
        "--port", str(port), "--ops-port", str(ops), "--parent-pid", str(os.getpid()),
        "--drain-spread-ms", "50", stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def three_free_ports() -> int:
    """The first of three in a row: the parent's ops port, and those of its two workers."""
    while True:
        with contextlib.ExitStack() as held:
            first = held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            try:
                for port in (first + 1, first + 2):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return int(first)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether it runs: a process that is over and not reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


async def answer_of(url: str, status: int) -> str:
    """The text, once the URL answers with this status."""
    async with asyncio.timeout(DEADLINE_S), aiohttp.ClientSession() as http:
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with http.get(url) as answer:
                    text = await answer.text()
                    if answer.status == status:
                        return text
            await asyncio.sleep(0.05)


async def test_workers_share_the_port_and_the_parent_is_ready_when_all_are(
    make_edge: Any, auth: Any
) -> None:
    edge = await make_edge()
    port, ops = free_port(), three_free_ports()
    async with parent_of_two(auth, port, ops, edge.peers.registry) as process:
        await answer_of(f"http://127.0.0.1:{ops}/readyz", 200)
        workers = children_of(process.pid)
        assert len(workers) == 2
        for number in (1, 2):
            text = await answer_of(f"http://127.0.0.1:{ops + number}/readyz", 200)
            assert "ready" in text
        # The kernel spreads connections: among sixty-four both workers have some.
        url = f"ws://127.0.0.1:{port}/v1/connect"
        async with contextlib.AsyncExitStack() as opened:
            for number in range(64):
                headers = edge.bearer(f"user-{number}")
                socket_ = await opened.enter_async_context(
                    edge.http.ws_connect(url, headers=headers)
                )
                assert (await socket_.receive_json(timeout=DEADLINE_S))["type"] == "ready"
            for number in (1, 2):
                text = await answer_of(f"http://127.0.0.1:{ops + number}/metrics", 200)
                line = next(
                    line
                    for line in text.splitlines()
                    if line.startswith('steward_edge_connections{kind="websocket"}')
                )
                assert 0 < float(line.split()[-1]) < 64
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 0
        assert not any(map(is_alive, workers))


async def test_the_parent_is_not_ready_while_a_worker_is_not(auth: Any) -> None:
    port, ops = free_port(), three_free_ports()
    async with parent_of_two(auth, port, ops, "127.0.0.1:1") as process:
        await answer_of(f"http://127.0.0.1:{ops + 2}/readyz", 503)
        text = await answer_of(f"http://127.0.0.1:{ops}/readyz", 503)
        assert "edge-9-w0" in text
        assert process.returncode is None


async def test_when_one_worker_dies_all_end(make_edge: Any, auth: Any) -> None:
    edge = await make_edge()
    port, ops = free_port(), three_free_ports()
    async with parent_of_two(auth, port, ops, edge.peers.registry) as process:
        await answer_of(f"http://127.0.0.1:{ops}/readyz", 200)
        workers = children_of(process.pid)
        os.kill(workers[0], signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 1
        assert not any(map(is_alive, workers))


async def test_workers_die_with_their_parent(make_edge: Any, auth: Any) -> None:
    edge = await make_edge()
    port, ops = free_port(), three_free_ports()
    async with parent_of_two(auth, port, ops, edge.peers.registry) as process:
        await answer_of(f"http://127.0.0.1:{ops}/readyz", 200)
        workers = children_of(process.pid)
        process.kill()
        await process.wait()
        async with asyncio.timeout(DEADLINE_S):
            while any(map(is_alive, workers)):
                await asyncio.sleep(0.02)
        assert process.returncode == -signal.SIGKILL


async def test_a_public_port_in_use_is_wrong_use(auth: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        async with parent_of_two(auth, port, three_free_ports(), "127.0.0.1:1") as process:
            async with asyncio.timeout(DEADLINE_S):
                _, words = await process.communicate()
            assert process.returncode == 2
            assert str(port).encode() in words
