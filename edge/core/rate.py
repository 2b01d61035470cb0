"""Bounds on how often something may happen: a refilling allowance, and a count in a window."""

from collections import deque

MINUTE_MS = 60_000


class Allowance:
    """`per_minute` at once, refilled evenly. In thousandths, without floats."""

    __slots__ = ("_at_ms", "_left", "_per_minute")

    def __init__(self, per_minute: int, now_ms: int) -> None:
        self._per_minute = per_minute
        self._left = per_minute * MINUTE_MS
        self._at_ms = now_ms

    def take(self, now_ms: int) -> int:
        """Take one. 0: taken; else the milliseconds until there is one again."""
        most = self._per_minute * MINUTE_MS
        passed = max(now_ms - self._at_ms, 0)
        self._left = min(self._left + passed * self._per_minute, most)
        self._at_ms = now_ms
        if self._left >= MINUTE_MS:
            self._left -= MINUTE_MS
            return 0
        return -((self._left - MINUTE_MS) // self._per_minute)


class Strikes:
    """Counts offences; the `most`-th within a minute is one too many."""

    __slots__ = ("_most", "_times")

    def __init__(self, most: int) -> None:
        self._most = most
        self._times: deque[int] = deque()

    def add(self, now_ms: int) -> bool:
        """Record one. True: it was the last that is borne."""
        self._times.append(now_ms)
        while self._times[0] <= now_ms - MINUTE_MS:
            self._times.popleft()
        return len(self._times) >= self._most
