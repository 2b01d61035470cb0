"""Retention: events that are older than `keep_days` go, in the background and in small steps.

A sweep looks at all users; between its steps it rests for nine times as long as they took, so
that it has at most a tenth of what the engine can do, and appends wait for one step at most.
A database that is away ends a sweep; the next one begins anew. Wall times of this machine
decide; of every user the last append stays (`LogEngine.compact`).
"""

import asyncio
import logging
import time

from agent_service.log.port import LogEngine
from steward.errors import StewardError
from steward.telemetry.catalog import LogMetrics
from steward.telemetry.logs import fields

DAY_S = 86_400
MOST_PAUSE_S = 3600.0
LEAST_PAUSE_S = 0.5
SWEEPS_IN_TIME = 24
"""Sweeps in the time that events are kept: they stay for that much longer at most."""
REST = 9
MOST_REST_S = 1.0

_logger = logging.getLogger("steward.log")


def pause_s(keep_days: float) -> float:
    """Seconds between two sweeps."""
    return min(max(keep_days * DAY_S / SWEEPS_IN_TIME, LEAST_PAUSE_S), MOST_PAUSE_S)


def clock_ms(keep_days: float, most_ms: int) -> int:
    """How exactly ages have to be known, in milliseconds; at most `most_ms`."""
    if not keep_days:
        return most_ms
    return min(most_ms, int(keep_days * DAY_S * 1000 / SWEEPS_IN_TIME))


async def keep_days(engine: LogEngine, days: float, metrics: LogMetrics) -> None:
    """Remove what is older than `days`, again and again. Ends by being cancelled, or by LogFailed.

    `days` is more than 0.
    """
    while True:
        began = time.monotonic()
        before_ms = time.time_ns() // 1_000_000 - int(days * DAY_S * 1000)
        try:
            removed = await sweep(engine, before_ms)
        except StewardError as error:
            _logger.info("old events are not removed yet", extra=fields(why=error.message))
        else:
            metrics.compacted.inc(removed)
            if removed:
                took = round(time.monotonic() - began, 1)
                _logger.info("old events removed", extra=fields(events=removed, seconds=took))
        await asyncio.sleep(pause_s(days))


async def sweep(engine: LogEngine, before_ms: int) -> int:
    """One sweep over all users; how many events it removed. Raises as `LogEngine.compact`."""
    removed = 0
    after: int | None = 0
    while after is not None:
        began = time.monotonic()
        step = await engine.compact(before_ms, after)
        removed += step.removed
        after = step.after
        if after is not None:
            await asyncio.sleep(min(REST * (time.monotonic() - began), MOST_REST_S))
    return removed
