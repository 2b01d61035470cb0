"""One direction between two event loops in two threads: what waits crosses together.

The sender never waits and takes no lock; the receiver is woken once per batch, and a wake-up
is what a crossing costs. So each item says how urgent it is: `put` crosses at once; `put_soon`
may wait for company, but not after a quiet time; what is put `quietly` wakes nobody, unless
the receiver has said that it waits for something.

The crossing itself has no bound: what may be in it is bounded by its users (the window of
unacknowledged verbs of each run, and one command per verb or run the other way).
"""

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

HOLD_S = 0.001
"""Longest that `put_soon` waits for company, counted from the batch before.

Each batch costs the node, the log and the edge a message of their own, so that at some thousand
items a second it is the messages which fill the machine, not the items. A millisecond is below what
a commit and its way there and back take.
"""

BUSY = 4
"""After a batch of so many the receiver looks again by itself, `PACE_S` later: with a wake-up less
for each batch, and with twice as many in it."""

PACE_S = 0.002

ENOUGH = 32
"""So many items have company: they cross at once. Half of the window of a run, which is on its way
while the other half is filled."""

MOST_AT_ONCE = 512
"""Items that are consumed in one step of the receiver's loop. Some hundred users who all go at full
speed put ten thousands at once; the loop that takes them has a lease to renew in between."""

Item = TypeVar("Item")


class Crossing(Generic[Item]):
    """Items put in one thread are consumed in batches, in order, on `loop`.

    One thread may put, the loop's thread consumes. Items put after the loop was closed are
    dropped: nobody is there any more.
    """

    __slots__ = (
        "_awake",
        "_consume",
        "_context",
        "_drained_at",
        "_hurried",
        "_items",
        "_loop",
        "_paced",
        "_timer",
        "_waiting",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, consume: Callable[[list[Item]], None]
    ) -> None:
        self._loop = loop
        self._consume = consume
        self._items: deque[Item] = deque()
        # What was asked of the receiver's loop and not done yet: to look, or to take at once.
        self._awake = False
        self._hurried = False
        # The rest belongs to the receiver, but that the sender reads `_waiting`.
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None
        self._drained_at = 0.0
        # Whether what comes is held at all.
        self._paced = False
        # Its own: context variables of one side (whose run is this?) mean nothing on the other.
        self._context = contextvars.copy_context()

    # The sender's side. Each adds its items before it looks at a flag, and the receiver lowers
    # or raises its flags before it takes the items: nothing is left behind.

    def put(self, item: Item) -> None:
        """Send one item, and what was held before it, at once. Never blocks."""
        self._items.append(item)
        self.hurry()

    def put_soon(self, item: Item) -> None:
        """Send one item together with those of the next `HOLD_S`; at once after a quiet time."""
        self._items.append(item)
        if len(self._items) >= ENOUGH:
            self.hurry()
        elif not self._awake:
            self._awake = True
            self._call(self._arrive)

    def put_quietly(self, items: Iterable[Item]) -> None:
        """Send items that matter to a receiver who waits; another one finds them when it does."""
        self._items.extend(items)
        if self._waiting:
            self.hurry()

    def hurry(self) -> None:
        """Let cross at once what is held, if anything is."""
        if self._items and not self._hurried:
            self._hurried = self._awake = True
            self._call(self._drain)

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, context=self._context)
        except RuntimeError:
            self._items.clear()

    # The receiver's side.

    def begin_wait(self) -> None:
        """From now on what is put quietly wakes this side, and what was is consumed here."""
        self._waiting += 1
        if self._items:
            self._context.run(self._take, len(self._items))

    def end_wait(self) -> None:
        """As often as `begin_wait`."""
        self._waiting -= 1

    def _arrive(self) -> None:
        self._paced = True
        if self._hurried:
            return  # Taken at once, behind this.
        wait_s = self._drained_at + HOLD_S - time.monotonic()
        if wait_s <= 0:
            self._drain()
        elif self._timer is None and self._items:
            self._timer = self._loop.call_later(wait_s, self._drain, context=self._context)

    def _drain(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # Lowered before the items are taken: what is put from here on wakes us again.
        self._awake = self._hurried = False
        if len(self._items) > MOST_AT_ONCE:
            self._awake = self._hurried = True
            self._loop.call_soon(self._drain, context=self._context)
        if self._items:
            taken = self._take(MOST_AT_ONCE)
            if taken >= BUSY and self._paced and self._timer is None and not self._hurried:
                self._awake = True
                self._timer = self._loop.call_later(PACE_S, self._drain, context=self._context)

    def _take(self, most: int) -> int:
        self._drained_at = time.monotonic()
        items = self._items
        batch: list[Item] = []
        while items and len(batch) < most:
            batch.append(items.popleft())
        self._consume(batch)
        return len(batch)
