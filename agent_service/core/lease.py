"""Is this node's lease certain, as far as the node itself can know (P3)?

The node's own deadline is the moment at which it *sent* the newest renewal that was answered,
plus nine tenths of the TTL: the registry counts from later, so it is the node that stops first,
as long as the clocks of the two run at about the same rate. Once the deadline has passed without
an answer the lease is uncertain: managers of strict tenants end, and no manager is made. For the
rest nothing changes: the log alone decides.

It does not know whether the lease is over: only an answer of the registry says that. Pure; times
are CLOCK_BOOTTIME milliseconds of this machine.
"""

from enum import Enum

_NUMERATOR = 9
_DENOMINATOR = 10
_MOST_UNANSWERED = 256
"""Renewals without an answer that are remembered; one to an older one means nothing any more."""


class LeaseChange(Enum):
    """What a look at the lease found."""

    UNCERTAIN = "uncertain"
    CERTAIN = "certain"


class NodeLease:
    """The lease of one incarnation. Uncertain until the first welcome."""

    __slots__ = ("_certain", "_sent", "_ttl_ms", "_until_ms")

    def __init__(self) -> None:
        self._ttl_ms = 0
        self._until_ms = 0
        self._certain = False
        # Renewal → when it was sent; ascending.
        self._sent: dict[int, int] = {}

    @property
    def certain(self) -> bool:
        """What the last look found."""
        return self._certain

    @property
    def until_ms(self) -> int:
        """From this moment on the lease is uncertain, unless an answer comes before."""
        return self._until_ms

    def welcomed(self, hello_sent_ms: int, ttl_ms: int) -> None:
        """A welcome answers the hello as if that were a renewal."""
        self._ttl_ms = ttl_ms
        self._sent.clear()
        self._extend(hello_sent_ms)

    def renewing(self, renewal: int, now_ms: int) -> None:
        """A renewal is about to be sent. Numbers ascend."""
        self._sent[renewal] = now_ms
        if len(self._sent) > _MOST_UNANSWERED:
            del self._sent[next(iter(self._sent))]

    def renewed(self, renewal: int) -> None:
        """The registry answered this renewal; those before it will not count any more."""
        sent_ms = self._sent.get(renewal)
        if sent_ms is None:
            return
        self._sent = {number: at for number, at in self._sent.items() if number > renewal}
        self._extend(sent_ms)

    def look(self, now_ms: int) -> LeaseChange | None:
        """Whether the lease became uncertain, or certain again, since the last look."""
        certain = now_ms < self._until_ms
        if certain is self._certain:
            return None
        self._certain = certain
        return LeaseChange.CERTAIN if certain else LeaseChange.UNCERTAIN

    def _extend(self, sent_ms: int) -> None:
        until_ms = sent_ms + self._ttl_ms * _NUMERATOR // _DENOMINATOR
        self._until_ms = max(self._until_ms, until_ms)
