"""Runs the processes of a load and adds up what they find.

`generate` carries out a plan and returns `Found`. It raises `LoadBroken` as soon as one process
has met something that is wrong, after it has ended all of them: no figure is made of a stream that
was not whole.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from steward.load.histogram import Histogram
from steward.load.plan import LoadPlan, shares
from steward.load.worker import Broken, Done, Progress, Up, work

LEAD_S = 0.2
"""Between the word that all begin and the beginning: every process must have heard it."""

SILENT_S = 90.0


class LoadBroken(Exception):
    """A stream was not whole, a connection was refused, or a process of the generator died."""


@dataclass(slots=True)
class Found:
    """What was measured so far. `seconds` is from the first message to the last end of a run."""

    connect_s: float = 0.0
    seconds: float = 0.0
    events: int = 0
    frames: int = 0
    latency: Histogram = field(default_factory=Histogram)
    client_cpu_s: float = 0.0

    @property
    def events_per_s(self) -> float:
        return self.events / self.seconds if self.seconds else 0.0


class Watcher:
    """Told of the course of a load; each method may be called often and must return at once."""

    def up(self, connections: int) -> None:
        """So many connections more are ready."""

    def begins(self) -> None:
        """All are ready; the load is about to begin."""

    def progress(self, found: Found, events: int, latency: Histogram) -> None:
        """`events` more, with their latencies; `found` is all so far."""

    def ended(self) -> None:
        """The last run has ended."""


def generate(plan: LoadPlan, watcher: Watcher) -> Found:
    """Carry out a plan. Raises LoadBroken."""
    return _Generator(plan, watcher).run()


class _Generator:
    def __init__(self, plan: LoadPlan, watcher: Watcher) -> None:
        self._plan = plan
        self._watcher = watcher
        self._found = Found()
        self._pipes: list[Connection[Any, Any]] = []
        self._processes: list[BaseProcess] = []

    def run(self) -> Found:
        began = time.monotonic()
        context = get_context("spawn")
        try:
            for share in shares(self._plan, sorted(os.sched_getaffinity(0))):
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=(share, theirs), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
            self._until_each(Up, lambda up: self._watcher.up(up.connections))
            self._found.connect_s = time.monotonic() - began
            self._watcher.begins()
            begin = time.monotonic() + LEAD_S
            for pipe in self._pipes:
                pipe.send(begin)
            self._until_each(Done, self._add_cpu)
            self._found.seconds = time.monotonic() - begin
            self._watcher.ended()
        finally:
            self._end()
        return self._found

    def _until_each(self, kind: type, do: Callable[[Any], None]) -> None:
        """Read until each process has sent one of `kind`."""
        waiting = set(self._pipes)
        while waiting:
            ready = connection.wait(list(waiting), SILENT_S)
            if not ready:
                raise LoadBroken(f"nothing was heard of a process for {SILENT_S:g} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    said = pipe.recv()
                except (EOFError, ConnectionError):
                    raise LoadBroken("a process of the load generator has died") from None
                if isinstance(said, Broken):
                    raise LoadBroken(said.why)
                if isinstance(said, Progress):
                    self._add(said)
                if isinstance(said, kind):
                    do(said)
                    waiting.discard(pipe)

    def _add(self, progress: Progress) -> None:
        found = self._found
        found.events += progress.events
        found.frames += progress.frames
        found.latency.merge(progress.latency)
        self._watcher.progress(found, progress.events, progress.latency)

    def _add_cpu(self, done: Done) -> None:
        self._found.client_cpu_s += done.cpu_s

    def _end(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
