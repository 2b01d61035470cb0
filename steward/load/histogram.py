"""Latencies by the million: counts in buckets that are at most 3 % wide; they add up."""

from collections import Counter

_BITS = 5


class Histogram:
    """Counts of durations in whole microseconds."""

    __slots__ = ("counts", "most")

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.most = 0
        """The longest, exactly."""

    def add(self, us: int) -> None:
        """Count one; below 0 (a clock was set) counts as 0."""
        us = max(us, 0)
        if us > self.most:
            self.most = us
        shift = us.bit_length() - _BITS - 1
        self.counts[us if shift <= 0 else (shift << _BITS) + (us >> shift)] += 1

    def merge(self, other: "Histogram") -> None:
        """Add another's counts to these."""
        self.counts.update(other.counts)
        self.most = max(self.most, other.most)

    def take(self) -> "Histogram":
        """What was counted since the last take; nothing is left here."""
        taken = Histogram()
        taken.counts, taken.most = self.counts, self.most
        self.counts, self.most = Counter(), 0
        return taken

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def percentile(self, share: float) -> float:
        """Milliseconds that this share (0 to 1) does not exceed; 0 when there are none."""
        wanted = share * self.total
        for index in sorted(self.counts):
            wanted -= self.counts[index]
            if wanted <= 0:
                return min(_upper(index), self.most) / 1000
        return 0.0


def _upper(index: int) -> int:
    """The longest duration that the bucket holds."""
    shift = max((index >> _BITS) - 1, 0)
    return index if not shift else ((index - (shift << _BITS) + 1) << shift) - 1
