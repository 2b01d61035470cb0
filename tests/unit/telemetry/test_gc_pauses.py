"""Pauses of the garbage collector are seen, with their generation."""

import gc

from prometheus_client import CollectorRegistry

from steward.telemetry.catalog import ServiceMetrics
from steward.telemetry.gc_pauses import GcPauses


def count(registry: CollectorRegistry, generation: int) -> float:
    labels = {"generation": str(generation)}
    value = registry.get_sample_value("steward_gc_pause_seconds_count", labels)
    assert value is not None
    return value


def test_a_collection_is_observed_under_its_generation_until_the_watch_ends() -> None:
    registry = CollectorRegistry()
    pauses = GcPauses(ServiceMetrics(registry).gc_pauses)
    gc.collect()
    assert count(registry, 2) == 0
    pauses.start()
    pauses.start()
    gc.collect()
    pauses.stop()
    pauses.stop()
    gc.collect()
    assert count(registry, 2) == 1
    took = registry.get_sample_value("steward_gc_pause_seconds_sum", {"generation": "2"})
    assert took is not None and 0 < took < 10


def test_a_short_collection_of_the_young_is_not_worth_an_observation() -> None:
    registry = CollectorRegistry()
    pauses = GcPauses(ServiceMetrics(registry).gc_pauses)
    gc.collect()
    pauses.start()
    for _ in range(100):
        gc.collect(0)
    pauses.stop()
    assert count(registry, 0) < 50
