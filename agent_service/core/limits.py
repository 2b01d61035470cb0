"""Limits that one manager decides exactly, since it sees every message of its user."""

from collections import deque

MINUTE_MS = 60_000


class MessagesPerMinute:
    """A sliding window. Times are those of a clock that never goes back."""

    __slots__ = ("_recent", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # Made by the first message: most users of a node are silent, and a deque is 760 bytes.
        self._recent: deque[int] | None = None

    def take(self, now_ms: int) -> int:
        """0 when a message may come now, which counts it; else the milliseconds to wait."""
        recent = self._recent
        if recent is None:
            recent = self._recent = deque()
        while recent and recent[0] <= now_ms - MINUTE_MS:
            recent.popleft()
        if len(recent) >= self.limit:
            return recent[0] + MINUTE_MS - now_ms
        recent.append(now_ms)
        return 0
