"""`EdgeWorkers`: several edge processes behind one public port, under one parent.

An edge uses one core. With `workers` N the parent starts N edges, `<id>-w0` and so on, that all
listen on the port (SO_REUSEPORT: the kernel spreads the connections), and serves nobody
itself. Each worker is an edge of its own to the cluster, with its own limits, streams and ops
port: the parent's plus 1 + i, or a free one that the log names. The parent is ready when all
workers are.

They end together: at a signal each sees its connections off; when one dies, the others are
stopped and the parent ends, with code 2 if that was the worker's, else 1. Nothing is started
again here: that is the supervisor's part. When the parent dies, by whatever cause, so do they.
"""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Sequence

import aiohttp
from prometheus_client import CollectorRegistry

from edge.settings import EdgeSettings
from steward.runtime.service import EnvironmentUnusable
from steward.telemetry.logs import fields

LOOK_S = 0.25
"""How often the workers are asked whether they are ready."""

STOP_S = 8.0
"""A worker is done within 5 s; one that is not is killed."""

EXIT_WRONG_USE = 2
_log = logging.getLogger(__name__)


class EdgeWorkers:
    """`steward.runtime.service.Service` for the parent. `port` is the public one after `start`."""

    def __init__(self, settings: EdgeSettings, arguments: Sequence[str]) -> None:
        """`arguments`: the command line, which the workers get too."""
        self.metrics = CollectorRegistry()
        self.port = settings.port
        self._settings = settings
        self._arguments = arguments
        self._held: list[socket.socket] = []
        self._workers: list[_Worker] = []
        self._looking: asyncio.Task[None] | None = None
        self._stopped = False

    async def start(self) -> None:
        """Hold the ports and start the workers. Raises EnvironmentUnusable."""
        settings = self._settings
        self.port = self._hold(settings.port)
        base = settings.id or f"edge-{socket.gethostname()}"
        for number in range(settings.workers):
            ops = self._hold(settings.ops_port + 1 + number if settings.ops_port else 0)
            worker = _Worker(f"{base}-w{number}", f"http://{settings.host}:{ops}/readyz")
            self._workers.append(worker)
            await worker.start(
                *self._arguments,
                *("--workers", "1", "--id", worker.id, "--parent-pid", str(os.getpid())),
                *("--port", str(self.port), "--ops-port", str(ops)),
            )
            _log.info("worker started", extra=fields(worker=worker.id, ops_port=ops))
        self._looking = asyncio.create_task(self._look(), name="look-after-workers")

    def _hold(self, port: int) -> int:
        """Bind without listening: the port is ours, and the workers can share it."""
        held = socket.socket()
        self._held.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            held.bind((self._settings.host, port))
        except OSError as error:
            raise EnvironmentUnusable(
                f"port {self._settings.host}:{port} can't be used: {error.strerror}"
            ) from None
        return int(held.getsockname()[1])

    def unready(self) -> str | None:
        """Why the first worker that is not ready is not."""
        if self._stopped:
            return "stopping"
        if not self._workers:
            return "starting"
        return next((f"{w.id}: {w.unready}" for w in self._workers if w.unready), None)

    async def failed(self) -> None:
        """Returns when a worker has ended. Raises EnvironmentUnusable if it could not run."""
        await asyncio.wait({w.ended for w in self._workers}, return_when=asyncio.FIRST_COMPLETED)
        worker = next(w for w in self._workers if w.ended.done())
        code = worker.ended.result()
        _log.error(
            "a worker ended; all end",
            extra=fields(worker=worker.id, code=code, do="see what it said before"),
        )
        if code == EXIT_WRONG_USE:
            await self.stop()
            raise EnvironmentUnusable(f"{worker.id} can't run; it said why")

    async def stop(self) -> None:
        """Stop all workers, each within its own deadline. Safe to call twice."""
        self._stopped = True
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})
        for worker in self._workers:
            worker.terminate()
        ended = {worker.ended for worker in self._workers}
        if ended:
            _, late = await asyncio.wait(ended, timeout=STOP_S)
            if late:
                for worker in self._workers:
                    worker.kill()
                await asyncio.wait(late)
        for held in self._held:
            held.close()

    async def _look(self) -> None:
        timeout = aiohttp.ClientTimeout(total=2.0)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            while True:
                for worker in self._workers:
                    await worker.look(http)
                await asyncio.sleep(LOOK_S)


class _Worker:
    """One edge process. `unready` is why it is not ready, as of the last look."""

    def __init__(self, worker_id: str, readyz: str) -> None:
        self.id = worker_id
        self.unready: str | None = "starting"
        self._readyz = readyz

    async def start(self, *arguments: str) -> None:
        # A session of its own: Ctrl-C is for the parent, and a second signal would cut it short.
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "edge", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        self.ended = asyncio.create_task(self._process.wait(), name=f"wait-for-{self.id}")

    async def look(self, http: aiohttp.ClientSession) -> None:
        try:
            async with http.get(self._readyz) as answer:
                body = await answer.json()
            self.unready = None if answer.status == 200 else str(body.get("why"))
        except (aiohttp.ClientError, TimeoutError, ValueError):
            self.unready = "does not answer"

    def terminate(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
