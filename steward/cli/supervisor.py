"""Keeps processes alive: starts them together, starts the dead ones again, stops them in order.

Each process runs under one id for the life of the supervisor. One that dies is started
again soon: an agent node after 1 s, since its users have been taken over by then, and with
less of the machine than those that serve until it is ready, while another node serves; the
rest after 0.1 s, since others wait for them. Who dies again within 1 s of being ready
waits twice as long each time, up to 30 s. When the whole is stopped, the groups of
`STOP_BY_S` get SIGTERM one after the other; what has not ended by its time gets SIGKILL.

Guaranteed: at most one process per id, and none left when `stop` or `kill` returned. It
does not restart what is alive but not ready: whether a process can do its work is told
by `/readyz`, and is shown, but a restart would not bring back a peer.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from steward.cli.probe import readiness
from steward.cli.process import Process

FIRST_DELAY_S: Mapping[str, float] = {"agent": 1.0}
DEFAULT_FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 30.0
GOOD_RUN_S = 1.0
POLL_S = 0.02
SLOW_POLL_S = 0.25
POLL_QUICKLY_FOR_S = 10.0
MOST_FAILED_STARTS = 3
EXIT_WRONG_USE = 2

STOP_BY_S: Mapping[str, float] = {
    "edge": 2.0,
    "agent": 7.5,
    "log": 8.5,
    "auth": 9.0,
    "registry": 9.5,
}
"""Roles in the order in which they stop, and by when, in seconds after the stop began."""


class ChildState(StrEnum):
    """Where a supervised process is in its life."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run, and where it will be found. Addresses are `host:port` or None."""

    role: str
    id: str
    command: tuple[str, ...]
    grpc: str | None
    http: str | None
    ops: str
    log: Path


class StartFailed(Exception):
    """A process that could not start at all. `code` is its exit code, `words` its last lines."""

    def __init__(self, spec: ProcessSpec, code: int, words: Sequence[str]) -> None:
        super().__init__(f"{spec.id} ended with code {code} before it was ready")
        self.spec = spec
        self.code = code
        self.words = tuple(words)


@dataclass(frozen=True, slots=True)
class Death:
    """A process that ended although nobody stopped it."""

    spec: ProcessSpec
    pid: int
    code: int
    words: tuple[str, ...]
    restart_in_s: float


def restart_delay_s(role: str, failures: int) -> float:
    """Seconds to wait before the start after `failures` (at least 1) deaths in a row."""
    first = FIRST_DELAY_S.get(role, DEFAULT_FIRST_DELAY_S)
    return min(LONGEST_DELAY_S, first * 2.0 ** min(failures - 1, 16))


class Child:
    """One id and the processes that run under it, one after the other."""

    def __init__(
        self,
        spec: ProcessSpec,
        environ: Mapping[str, str],
        on_ready: Callable[["Child"], None],
        on_death: Callable[[Death], None],
        has_deputy: Callable[["Child"], bool],
    ) -> None:
        """`has_deputy`: whether another child of its role serves."""
        self.spec = spec
        self.state = ChildState.STARTING
        self.why = ""
        self.pid = 0
        self.starts = 0
        self.was_ready = False
        self.last_death: Death | None = None
        self._environ = environ
        self._on_ready = on_ready
        self._on_death = on_death
        self._has_deputy = has_deputy
        self._process: Process | None = None
        self._stopping = asyncio.Event()
        self._failures = 0
        self._ready_at: float | None = None

    @property
    def restarts(self) -> int:
        return max(0, self.starts - 1)

    async def keep_alive(self) -> None:
        """Run processes until `stop_restarting`; returns when the last one is reaped."""
        while not self._stopping.is_set():
            death = await self._one_life()
            if self._stopping.is_set():
                break
            ready_at, self._ready_at = self._ready_at, None
            good = ready_at is not None and time.monotonic() - ready_at >= GOOD_RUN_S
            self._failures = 1 if good else self._failures + 1
            delay = restart_delay_s(self.spec.role, self._failures)
            self.last_death = Death(self.spec, self.pid, death[0], death[1], delay)
            self.state = ChildState.WAITING
            self._on_death(self.last_death)
            await self._rest(delay)
        self.state = ChildState.STOPPED

    def stop_restarting(self) -> None:
        """From now on a process that ends stays ended. Safe to call twice."""
        self._stopping.set()

    def send(self, number: signal.Signals) -> None:
        """Signal the process that runs now, if one does."""
        if self._process is not None:
            self._process.send(number)

    def hurry(self) -> None:
        """Nobody serves in its place any more: let it start as fast as it can."""
        if self._process is not None and self.state is ChildState.STARTING:
            self._process.step_up()

    async def _one_life(self) -> tuple[int, tuple[str, ...]]:
        self.state = ChildState.STARTING
        self.why = ""
        self.starts += 1
        try:
            self._process = process = Process.spawn(self.spec.command, self.spec.log, self._environ)
        except OSError as error:
            return -1, (f"can't be started: {error.strerror}",)
        self.pid = process.pid
        if self.was_ready and self.spec.role == "agent" and self._has_deputy(self):
            process.step_back()
        probing = asyncio.create_task(self._watch_readiness())
        try:
            code = await process.wait()
        finally:
            probing.cancel()
            await asyncio.wait({probing})
        return code, tuple(process.last_words())

    async def _watch_readiness(self) -> None:
        began = time.monotonic()
        while True:
            answer = await readiness(self.spec.ops)
            if answer.ready:
                self.why = ""
                self.state = ChildState.READY
                self.was_ready = True
                self._ready_at = time.monotonic()
                if self._process is not None:
                    self._process.step_up()
                self._on_ready(self)
                return
            self.why = answer.why
            quick = time.monotonic() - began < POLL_QUICKLY_FOR_S
            await asyncio.sleep(POLL_S if quick else SLOW_POLL_S)

    async def _rest(self, delay_s: float) -> None:
        try:
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()
        except TimeoutError:
            pass


class Supervisor:
    """A set of children. `start`, then `wait_ready`, then `stop` or `kill`, on one event loop."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        environ: Mapping[str, str],
        *,
        on_ready: Callable[[Child], None],
        on_death: Callable[[Death], None],
        stop_by_s: Mapping[str, float] = STOP_BY_S,
    ) -> None:
        self._notify_ready = on_ready
        self._notify_death = on_death
        self._stop_by_s = stop_by_s
        self._changed = asyncio.Event()
        self._tasks: dict[Child, asyncio.Task[None]] = {}
        self.children = tuple(
            Child(spec, environ, self._ready, self._died, self._has_deputy) for spec in specs
        )

    def start(self) -> list[asyncio.Task[None]]:
        """Start all of them at once. The tasks end only after `stop` or `kill`."""
        for child in self.children:
            self._tasks[child] = asyncio.create_task(child.keep_alive(), name=child.spec.id)
        return list(self._tasks.values())

    async def wait_ready(self) -> None:
        """Returns when all are ready.

        Raises StartFailed when a process says by exit code 2 that it can't be started
        like this, or has died three times without ever being ready.
        """
        while not all(child.state is ChildState.READY for child in self.children):
            self._changed.clear()
            for child in self.children:
                death = child.last_death
                if death is None or child.was_ready:
                    continue
                if death.code == EXIT_WRONG_USE or child.starts >= MOST_FAILED_STARTS:
                    raise StartFailed(child.spec, death.code, death.words)
            await self._changed.wait()

    def unready(self) -> list[tuple[str, str]]:
        """(id, what it waits for) of those that are not ready."""
        return [
            (child.spec.id, child.why or child.state.value)
            for child in self.children
            if child.state is not ChildState.READY
        ]

    async def stop(self) -> list[str]:
        """Stop role after role within the times of `stop_by_s`; ids of those that had to be killed.

        Safe to call twice.
        """
        began = time.monotonic()
        killed: list[str] = []
        for child in self.children:
            child.stop_restarting()
        for role, stop_by in self._stop_by_s.items():
            group = self._of_role(role)
            for child in group:
                child.send(signal.SIGTERM)
            left = await self._ended(group, stop_by - (time.monotonic() - began))
            for child in left:
                killed.append(child.spec.id)
                child.send(signal.SIGKILL)
        await self._ended(self.children, None)
        return killed

    def kill(self) -> None:
        """SIGKILL to all of them, now."""
        for child in self.children:
            child.stop_restarting()
            child.send(signal.SIGKILL)

    async def _ended(self, group: Sequence[Child], timeout_s: float | None) -> list[Child]:
        """Wait for the end of a group; those that are still running."""
        tasks = {self._tasks[child]: child for child in group if child in self._tasks}
        if not tasks:
            return []
        wait_s = None if timeout_s is None else max(0.0, timeout_s)
        done, pending = await asyncio.wait(tasks, timeout=wait_s)
        for task in done:
            task.result()
        return [tasks[task] for task in pending]

    def _of_role(self, role: str) -> list[Child]:
        return [child for child in self.children if child.spec.role == role]

    def _has_deputy(self, child: Child) -> bool:
        others = self._of_role(child.spec.role)
        return any(o.state is ChildState.READY for o in others if o is not child)

    def _ready(self, child: Child) -> None:
        self._changed.set()
        self._notify_ready(child)

    def _died(self, death: Death) -> None:
        self._changed.set()
        for child in self._of_role(death.spec.role):
            if not self._has_deputy(child):
                child.hurry()
        self._notify_death(death)
