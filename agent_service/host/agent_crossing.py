"""One direction between two event loops in two threads: what waits crosses together.

The sender never waits and takes no lock; the receiver is woken once per batch. The
crossing itself has no bound: what may be in it is bounded by its users (the window of
unacknowledged verbs of each run, and one command per verb or run the other way).
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Crossing(Generic[Item]):
    """Items put in one thread are consumed in batches, in order, on `loop`.

    One thread may put, the loop's thread consumes. Items put after the loop was closed are
    dropped: nobody is there any more.
    """

    __slots__ = ("_awake", "_consume", "_context", "_items", "_loop")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, consume: Callable[[list[Item]], None]
    ) -> None:
        self._loop = loop
        self._consume = consume
        self._items: deque[Item] = deque()
        self._awake = False
        # Its own: context variables of one side (whose run is this?) mean nothing on the other.
        self._context = contextvars.copy_context()

    def put(self, item: Item) -> None:
        """Send one item. Never blocks."""
        self._items.append(item)
        if not self._awake:
            self._wake()

    def put_all(self, items: Iterable[Item]) -> None:
        """Send several items as one batch. Never blocks."""
        self._items.extend(items)
        if not self._awake and self._items:
            self._wake()

    def _wake(self) -> None:
        self._awake = True
        try:
            self._loop.call_soon_threadsafe(self._drain, context=self._context)
        except RuntimeError:
            self._items.clear()

    def _drain(self) -> None:
        # Lowered before the items are taken: what is put from here on wakes us again.
        self._awake = False
        items = self._items
        batch: list[Item] = []
        while items:
            batch.append(items.popleft())
        if batch:
            self._consume(batch)
