"""The pace of retention: sweeps go on whatever the database does, and rest between their steps."""

import asyncio
import time
from contextlib import suppress

import pytest
from prometheus_client import CollectorRegistry

from agent_service.log import retention
from agent_service.log.port import Compaction
from steward.errors import Reason, StewardError
from steward.telemetry.catalog import LogMetrics

DAY_MS = 86_400_000


class Engine:
    """Gives out what it is told to, and notes what it was asked for."""

    def __init__(self, *steps: Compaction | StewardError) -> None:
        self.steps = list(steps)
        self.asked: list[tuple[int, int]] = []
        self.done = asyncio.Event()

    async def compact(self, before_ms: int, after: int = 0) -> Compaction:
        self.asked.append((before_ms, after))
        step = self.steps.pop(0)
        if not self.steps:
            self.done.set()
        if isinstance(step, StewardError):
            raise step
        return step


@pytest.mark.asyncio
async def test_a_sweep_that_failed_begins_anew_and_what_went_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retention, "LEAST_PAUSE_S", 0.001)
    away = StewardError(Reason.STORE_UNAVAILABLE, "away")
    end = Compaction(0, None)
    engine = Engine(Compaction(5, 7), away, Compaction(3, 9), Compaction(2, 12), end, end)
    metrics = LogMetrics(CollectorRegistry())
    days = 1e-8
    task = asyncio.create_task(retention.keep_days(engine, days, metrics))  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        await engine.done.wait()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert [after for _, after in engine.asked] == [0, 7, 0, 9, 12, 0]
    assert metrics.compacted._value.get() == 5
    now_ms = time.time_ns() // 1_000_000
    assert all(now_ms - 60_000 < before <= now_ms for before, _ in engine.asked)


def test_pauses_and_ages_fit_the_time_that_events_are_kept() -> None:
    assert retention.pause_s(30) == 3600
    assert retention.pause_s(1 / 24) == pytest.approx(150)
    assert retention.pause_s(1e-9) == retention.LEAST_PAUSE_S
    assert retention.clock_ms(0, 60_000) == retention.clock_ms(30, 60_000) == 60_000
    assert retention.clock_ms(1 / DAY_MS * 2400, 60_000) == 100
