"""One process of the load generator: its users' connections, checked and counted.

`work` is the process. It talks with who started it over a pipe: it sends `Up` when all of its
connections are ready, waits for the time to begin, sends `Progress` four times a second, and `Done`
when every run has ended at every tab; or `Broken`, once, at the first thing that is wrong: a gap, a
repeat, an event of another stream, a closed connection, a refusal, a run that does not end.
"""

import asyncio
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from steward.load.histogram import Histogram
from steward.load.plan import Share
from steward.load.wire import LoadSocket, StreamBroken, connect

CONNECTS_AT_ONCE = 64
PROGRESS_S = 0.25
END_S = 30.0
_AT = b'"at":'
_AT_DIGITS = 19


@dataclass(frozen=True, slots=True)
class Up:
    """All connections of this process have their `ready`."""

    connections: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Since the last one: durable events, the frames that brought them, verb to socket."""

    events: int
    frames: int
    latency: Histogram


@dataclass(frozen=True, slots=True)
class Done:
    """Every run has ended. `cpu_s` is the CPU time of this process since the beginning."""

    cpu_s: float


@dataclass(frozen=True, slots=True)
class Broken:
    """Nothing that was measured counts."""

    why: str


def work(share: Share, pipe: "Connection[Any, Any]") -> None:
    """Do a share. What it meets goes into the pipe; if nobody reads that, it ends."""
    # Ctrl-C reaches every process of the group: who started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if share.cpu is not None:
        os.sched_setaffinity(0, {share.cpu})
    with suppress(BrokenPipeError, EOFError):
        try:
            uvloop.run(_Worker(share, pipe).run())
        except TimeoutError:
            pipe.send(Broken("it took too long: a connection got no `ready`, or a run did not end"))
        except (StreamBroken, OSError) as error:
            pipe.send(Broken(str(error) or type(error).__name__))


class _Worker:
    def __init__(self, share: Share, pipe: "Connection[Any, Any]") -> None:
        self._share = share
        self._pipe = pipe
        self._latency = Histogram()
        self._sockets: list[list[LoadSocket]] = []
        self._events = self._frames = 0

    async def run(self) -> None:
        share = self._share
        self._sockets = await self._connect()
        self._pipe.send(Up(len(share.users) * share.plan.tabs))
        begin = await asyncio.get_running_loop().run_in_executor(None, self._pipe.recv)
        await asyncio.sleep(begin - time.monotonic())
        cpu = time.process_time()
        telling = asyncio.create_task(self._keep_telling())
        try:
            for index, tabs in enumerate(self._sockets):
                for socket in tabs:
                    socket.on_event = self._note
                # An id of its own each time, or the manager takes it for a repeat.
                message_id = f"load-{time.time_ns()}-{index}"
                tabs[0].send(message_id, share.message(index), share.plan.agent)
            await self._until_all_ended()
        finally:
            telling.cancel()
            await asyncio.wait({telling})
        self._tell()
        self._pipe.send(Done(time.process_time() - cpu))
        for tabs in self._sockets:
            for socket in tabs:
                socket.close()

    async def _connect(self) -> list[list[LoadSocket]]:
        plan = self._share.plan
        limit = asyncio.Semaphore(CONNECTS_AT_ONCE)

        async def one(number: int, user: str, token: str) -> LoadSocket:
            async with limit:
                address = plan.addresses[number % len(plan.addresses)]
                return await connect(address, user, token, plan.secure)

        first = self._share.first
        return await asyncio.gather(
            *(
                asyncio.gather(*(one(number + tab, *user) for tab in range(plan.tabs)))
                for number, user in enumerate(self._share.users, first)
            )
        )

    async def _until_all_ended(self) -> None:
        plan = self._share.plan
        timeout_s = plan.seconds + END_S
        await asyncio.gather(
            *(socket.until_runs_ended(1, timeout_s) for tabs in self._sockets for socket in tabs)
        )

    def _note(self, text: bytes) -> None:
        at = text.rfind(_AT)
        if at > 0:
            at += len(_AT)
            sent_ns = text[at : at + _AT_DIGITS]
            if sent_ns.isdigit():
                self._latency.add((time.time_ns() - int(sent_ns)) // 1000)

    async def _keep_telling(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            self._tell()

    def _tell(self) -> None:
        events = sum(tabs[0].events for tabs in self._sockets)
        frames = sum(socket.events for tabs in self._sockets for socket in tabs)
        self._pipe.send(
            Progress(events - self._events, frames - self._frames, self._latency.take())
        )
        self._events, self._frames = events, frames
