"""How long Python's garbage collector held a process up, by generation.

It stops all threads of the interpreter, so the loop can't measure it from inside a timer alone.
The interpreter calls before and after each collection; only what lasts is worth an observation
of the young generation, which is collected hundreds of times a second under load: there the
call back costs a clock reading, and those under `NOTEWORTHY_S` are not counted.
"""

import gc
import time

from prometheus_client import Histogram

NOTEWORTHY_S = 0.0005
"""A collection of the youngest generation that is shorter is not observed."""


class GcPauses:
    """Feeds a histogram with the label `generation`, in seconds. One per process."""

    __slots__ = ("_began", "_by_generation", "_started")

    def __init__(self, histogram: Histogram) -> None:
        self._by_generation = [histogram.labels(str(number)) for number in range(3)]
        self._began = 0.0
        self._started = False

    def start(self) -> None:
        """Begin to watch. Safe to call twice."""
        if not self._started:
            self._started = True
            gc.callbacks.append(self._called)

    def stop(self) -> None:
        """End. Safe to call twice."""
        if self._started:
            self._started = False
            gc.callbacks.remove(self._called)

    def _called(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
            return
        seconds = time.perf_counter() - self._began
        generation = info["generation"]
        if generation or seconds >= NOTEWORTHY_S:
            self._by_generation[generation].observe(seconds)
