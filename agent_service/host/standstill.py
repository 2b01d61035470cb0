"""Did this process stand still for longer than its lease? Asked before each step.

A process that was stopped (SIGSTOP, a frozen machine, a blocked loop) wakes up with work
in its hands: answers of the log, commands, verbs. A timer alone would notice after them. So
whoever acts asks first; the answer, once it is yes, stays yes. Pauses that were shorter
are remembered for a while, as evidence of what came of them.

It does not know whether the registry has noticed, and reads no clock: times are those of
CLOCK_BOOTTIME, in milliseconds.
"""

WORTH_TELLING_MS = 500
REMEMBERED_MS = 30_000


class Standstill:
    """Fed with every sign of life by the owner of the event loop."""

    __slots__ = ("_lease_ms", "_longest_ms", "_noticed_ms", "_seen_ms", "stood_ms")

    def __init__(self, now_ms: int) -> None:
        self._seen_ms = now_ms
        self._lease_ms = 0
        self._longest_ms = 0
        self._noticed_ms = 0
        self.stood_ms = 0
        """How long this process stood still when that was too long; 0 while it was not."""

    def allow(self, now_ms: int, lease_ms: int) -> None:
        """From now on, standing still for longer than this is too long."""
        self._seen_ms = now_ms
        self._lease_ms = lease_ms

    def too_long(self, now_ms: int) -> bool:
        """Whether this process stood still, now or before, for longer than its lease."""
        if not self.stood_ms and self._lease_ms and now_ms - self._seen_ms > self._lease_ms:
            self.stood_ms = now_ms - self._seen_ms
        return self.stood_ms > 0

    def sign(self, now_ms: int) -> bool:
        """A timer ran: the process lives. False when it stood still for too long before."""
        if self.too_long(now_ms):
            return False
        gap_ms, self._seen_ms = now_ms - self._seen_ms, now_ms
        if gap_ms >= max(self.recent_ms(now_ms), WORTH_TELLING_MS):
            self._longest_ms, self._noticed_ms = gap_ms, now_ms
        return True

    def recent_ms(self, now_ms: int) -> int:
        """The longest pause that was noticed in the last 30 s, or 0."""
        if self.stood_ms:
            return self.stood_ms
        current_ms = now_ms - self._seen_ms
        longest_ms = self._longest_ms if now_ms - self._noticed_ms < REMEMBERED_MS else 0
        return max(longest_ms, current_ms if current_ms >= WORTH_TELLING_MS else 0)
