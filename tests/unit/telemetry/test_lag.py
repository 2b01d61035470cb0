"""The loop lag probe sees code that blocks the loop."""

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry

from steward.telemetry.catalog import ServiceMetrics
from steward.telemetry.lag import INTERVAL_S, LagProbe


@pytest.mark.asyncio
async def test_a_blocked_loop_is_seen_and_a_stopped_probe_measures_nothing() -> None:
    registry = CollectorRegistry()
    probe = LagProbe(ServiceMetrics(registry).loop_lag)
    probe.start()
    probe.start()

    def samples() -> float:
        return registry.get_sample_value("steward_loop_lag_seconds_count") or 0.0

    time.sleep(INTERVAL_S + 0.3)  # noqa: ASYNC251 (blocking the loop is what is tested)
    async with asyncio.timeout(5):
        while not samples():
            await asyncio.sleep(0.01)
    assert probe.take_worst() >= 0.25
    assert probe.take_worst() == 0.0
    probe.stop()
    probe.stop()
    before = samples()
    await asyncio.sleep(3 * INTERVAL_S)
    assert samples() == before
