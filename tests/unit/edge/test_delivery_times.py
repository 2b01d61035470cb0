"""What an edge measures of the way of events: once per batch, and nothing without a time."""

import time
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry

from edge.host.timing import MOST_AWAITED, MOST_WATCHED, DeliveryTimes
from steward.telemetry.catalog import EdgeMetrics


@dataclass(eq=False)
class Stream:
    sequence: int = 0


class Rig:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.times = DeliveryTimes(EdgeMetrics(self.registry))

    def count(self, name: str) -> float:
        value = self.registry.get_sample_value(f"steward_edge_{name}_seconds_count")
        assert value is not None
        return value

    def sum(self, name: str) -> float:
        value = self.registry.get_sample_value(f"steward_edge_{name}_seconds_sum")
        assert value is not None
        return value


@pytest.fixture
def rig() -> Rig:
    return Rig()


def ago_us(seconds: float) -> int:
    return int((time.time() - seconds) * 1e6)


def test_a_batch_is_measured_once_from_its_oldest_append(rig: Rig) -> None:
    rig.times.batch_came(ago_us(2.0))
    rig.times.batch_came(ago_us(1.0))
    rig.times.batch_out(None, 0)
    rig.times.written()
    rig.times.written()
    assert rig.count("append_to_socket") == 1
    assert 2.0 <= rig.sum("append_to_socket") < 3.0


def test_a_batch_without_a_time_is_not_measured(rig: Rig) -> None:
    rig.times.batch_came(0)
    rig.times.written()
    assert rig.count("append_to_socket") == 0


def test_a_clock_that_is_behind_counts_as_no_time(rig: Rig) -> None:
    rig.times.batch_came(ago_us(-5.0))
    rig.times.written()
    assert rig.count("append_to_socket") == 1 and rig.sum("append_to_socket") == 0


def test_an_ack_is_measured_when_it_covers_the_event_that_is_watched(rig: Rig) -> None:
    connection = object()
    rig.times.batch_came(ago_us(1.0))
    rig.times.batch_out(connection, 7)
    rig.times.written()
    rig.times.acknowledged(connection, 6)
    rig.times.acknowledged(object(), 9)
    assert rig.count("append_to_ack") == 0
    rig.times.acknowledged(connection, 8)
    rig.times.acknowledged(connection, 9)
    assert rig.count("append_to_ack") == 1 and 1.0 <= rig.sum("append_to_ack") < 2.0


def test_a_connection_that_is_lost_or_too_old_is_watched_no_more(rig: Rig) -> None:
    connections = [object() for _ in range(MOST_WATCHED + 1)]
    for connection in connections:
        rig.times.batch_came(ago_us(1.0))
        rig.times.batch_out(connection, 1)
        rig.times.written()
    rig.times.lost(connections[-1])
    for connection in connections:
        rig.times.acknowledged(connection, 1)
    assert rig.count("append_to_ack") == MOST_WATCHED - 1


def test_the_first_event_is_the_one_behind_the_message(rig: Rig) -> None:
    stream = Stream(4)
    rig.times.accepted(stream, 5, time.perf_counter() - 1.0)
    stream.sequence = 5
    rig.times.batch_out(None, 0)
    assert rig.count("first_event") == 0
    stream.sequence = 6
    rig.times.batch_out(None, 0)
    rig.times.batch_out(None, 0)
    assert rig.count("first_event") == 1 and 1.0 <= rig.sum("first_event") < 2.0


def test_a_first_event_that_came_before_the_answer_counts(rig: Rig) -> None:
    rig.times.accepted(Stream(9), 5, time.perf_counter())
    assert rig.count("first_event") == 1


def test_messages_that_are_waited_for_are_bounded_and_end_with_their_stream(rig: Rig) -> None:
    streams = [Stream() for _ in range(MOST_AWAITED + 5)]
    for stream in streams:
        rig.times.accepted(stream, 1, time.perf_counter())
    rig.times.over(streams[0])
    for stream in streams:
        stream.sequence = 2
    rig.times.batch_out(None, 0)
    assert rig.count("first_event") == MOST_AWAITED - 1
