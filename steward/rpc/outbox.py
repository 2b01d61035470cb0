"""The outgoing half of a long stream: what waits travels together, and nothing waits for a timer.

Every bidirectional stream of Steward is written from one `Outbox`: by one loop over `take`, or,
on a framed connection, by whoever `woken` tells. While a message is being written, what
arrives collects; the next message carries all of it, up to a limit. So an idle stream adds no
latency and a busy one amortises the cost per message. The box is bounded: `put` raises
`OutboxFull` and the owner of the stream decides (an edge stream is closed, as its peer is not
reading).
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class OutboxFull(Exception):
    """The peer does not read: more items wait than the box may hold."""


class OutboxClosed(Exception):
    """The stream is over; nothing can be sent on it any more."""


class Outbox(Generic[Item]):
    """A bounded buffer between many writers and one stream. One event loop only; no locks."""

    __slots__ = ("_closed", "_items", "_limit", "_waiter", "woken")

    def __init__(self, limit: int = 65_536) -> None:
        self._items: deque[Item] = deque()
        self._limit = limit
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False
        self.woken: Callable[[], None] | None = None
        """Called when something is put, and when the box closes. For who does not `take`."""

    def __len__(self) -> int:
        return len(self._items)

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, item: Item) -> None:
        """Add one item. Raises OutboxFull or OutboxClosed; never waits."""
        if self._closed:
            raise OutboxClosed
        if len(self._items) >= self._limit:
            raise OutboxFull
        self._items.append(item)
        self._wake()

    def close(self) -> None:
        """End the stream after what waits was taken. Safe to call twice."""
        self._closed = True
        self._wake()

    async def take(self, most: int) -> list[Item]:
        """All that waits, at most `most` items; waits for the first. Empty means closed."""
        while not self._items:
            if self._closed:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.take_now(most)

    def take_now(self, most: int) -> list[Item]:
        """What waits, at most `most` items."""
        if len(self._items) <= most:
            taken = list(self._items)
            self._items.clear()
            return taken
        return [self._items.popleft() for _ in range(most)]

    def _wake(self) -> None:
        if self.woken is not None:
            self.woken()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
