"""The life of a service process: event loop, signals, ops port, drain, exit code.

`run(main, settings)` is the whole of a `__main__`. The first SIGTERM or SIGINT drains
and stops; the second exits at once with code 130. `--parent-pid` ties the process to
its supervisor: when that dies, by whatever cause, the kernel kills this one too.
"""

import asyncio
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import NoReturn, Protocol

import uvloop
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from steward.config.settings import ServiceSettings, SettingsError
from steward.rpc.keys import KeyUnusable

PR_SET_PDEATHSIG = 1


class EnvironmentUnusable(Exception):
    """The machine does not give what the service needs (port, lock, directory); exit code 2."""


class Service(Protocol):
    """What `run` drives. All methods are called on one event loop."""

    metrics: CollectorRegistry

    async def start(self) -> None:
        """Open everything; returns when serving. Raises EnvironmentUnusable or KeyUnusable."""
        ...

    def unready(self) -> str | None:
        """Why the service can't do its work right now; None when ready."""
        ...

    async def failed(self) -> None:
        """Returns when the service must end by itself (fenced, store broken); exit code 1."""
        ...

    async def stop(self) -> None:
        """Drain within the service's own deadline, then close. Safe to call twice."""
        ...


def run(make: Callable[[], Service], settings: ServiceSettings) -> NoReturn:
    """Run a service until a signal or its own failure, then exit the process."""
    _die_with(settings.parent_pid)
    _raise_open_files()
    try:
        code = uvloop.run(_main(make, settings))
    except (SettingsError, EnvironmentUnusable, KeyUnusable) as error:
        print(f"steward: {error}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    # Agent code may hold threads that never end; what had to be saved is saved.
    os._exit(code)


async def _main(make: Callable[[], Service], settings: ServiceSettings) -> int:
    service = make()
    stopping = asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            os._exit(130)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    ops = await serve_ops(service, settings)
    try:
        starting = asyncio.ensure_future(service.start())
        waiting = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
        else:
            starting.result()
            failing = asyncio.ensure_future(service.failed())
            await asyncio.wait({failing, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                failing.result()
                await service.stop()
                return 1
            failing.cancel()
        await service.stop()
        return 0
    finally:
        await ops.cleanup()


async def serve_ops(service: Service, settings: ServiceSettings) -> web.AppRunner:
    """Serve /metrics, /healthz and /readyz on the ops port.

    /healthz also tells the version and the wall clock [ms], for `steward doctor`.
    """

    version = metadata.version("steward")

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response(
            {"status": "ok", "version": version, "unix_ms": time.time_ns() // 1_000_000}
        )

    async def readyz(_: web.Request) -> web.Response:
        why = service.unready()
        if why is None:
            return web.json_response({"status": "ready"})
        return web.json_response({"status": "unready", "why": why}, status=503)

    async def metrics(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(service.metrics), headers={"Content-Type": content_type})

    app = web.Application()
    app.add_routes(
        [web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)]
    )
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    site = web.TCPSite(runner, settings.host, settings.ops_port, reuse_port=True)
    try:
        await site.start()
    except OSError as error:
        raise EnvironmentUnusable(
            f"ops port {settings.host}:{settings.ops_port} can't be used: {error.strerror}"
        ) from None
    return runner


def _raise_open_files() -> None:
    # The soft limit is for programs that use select(); every connection is an open file.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _die_with(parent_pid: int) -> None:
    if parent_pid <= 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died between fork and prctl.
    if os.getppid() != parent_pid:
        os._exit(1)
