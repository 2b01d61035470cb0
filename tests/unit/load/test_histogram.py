"""Latencies in buckets: what a percentile may be off by, and that parts add up to the whole."""

import random

import pytest

from steward.load.histogram import Histogram


def filled(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.999, 1.0])
def test_a_percentile_is_never_too_low_and_at_most_a_thirtieth_too_high(share: float) -> None:
    random_ = random.Random(7)
    values = sorted(int(random_.lognormvariate(7, 2)) for _ in range(20_000))
    exact = values[max(round(share * len(values)) - 1, 0)] / 1000
    found = filled(values).percentile(share)
    assert exact <= found <= exact * (1 + 1 / 30) + 0.001


@pytest.mark.parametrize("value", [0, 1, 63, 64, 65, 127, 128, 1_000_000, 3_600_000_000])
def test_a_single_value_is_its_own_percentile(value: int) -> None:
    assert filled([value]).percentile(0.5) == value / 1000


def test_the_histograms_of_two_processes_add_up() -> None:
    values = list(range(0, 100_000, 37))  # an odd number: the greatest is in the second half
    both = filled(values[1::2])
    both.merge(filled(values[::2]))
    whole = filled(values)
    assert (both.counts, both.most, both.total) == (whole.counts, whole.most, len(values))


def test_what_was_taken_is_gone() -> None:
    histogram = filled([5, 10])
    taken = histogram.take()
    assert (taken.total, taken.most) == (2, 10)
    assert (histogram.total, histogram.most, histogram.percentile(0.5)) == (0, 0, 0.0)


def test_a_clock_that_was_set_back_counts_as_no_time() -> None:
    histogram = filled([-5])
    assert (histogram.total, histogram.percentile(0.5)) == (1, 0.0)
