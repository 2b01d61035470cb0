"""How late an event loop runs its timers: the first sign of code that blocks it.

The probe is a timer that re-arms itself, not a task; it costs a few microseconds every
`INTERVAL_S`. A loop that is blocked for good shows no lag at all, since nothing runs:
that is seen from outside, by missed beats and probes.
"""

import asyncio

from prometheus_client import Histogram

INTERVAL_S = 0.1


class LagProbe:
    """Feeds a histogram with the lag of the running loop, in seconds."""

    __slots__ = ("_due", "_histogram", "_timer", "_worst")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._worst = 0.0

    def start(self) -> None:
        """Begin on the running loop. Safe to call twice."""
        if self._timer is None:
            self._arm(asyncio.get_running_loop())

    def stop(self) -> None:
        """End. Safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def take_worst(self) -> float:
        """The greatest lag in seconds since the last call, for beats."""
        worst, self._worst = self._worst, 0.0
        return worst

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + INTERVAL_S
        self._timer = loop.call_at(self._due, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        lag = max(0.0, loop.time() - self._due)
        self._histogram.observe(lag)
        self._worst = max(self._worst, lag)
        self._arm(loop)
