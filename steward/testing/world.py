"""A seeded world: virtual time, one heap of things to come, and clocks that do not agree.

Everything that happens is a step; the same seed gives the same steps. There is no
clock, no thread and no I/O, so a hundred seconds of a cluster take a fraction of one.
What happened last is kept as notes, unformatted until somebody asks.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable

Action = Callable[[], None]
MOST_NOTES = 2_000


class World:
    """Virtual time in milliseconds, and what will happen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_ms = 1_000
        self.steps = 0
        self._numbers = itertools.count()
        self._heap: list[tuple[int, int, Action]] = []
        self._notes: deque[tuple[int, int, str, tuple[object, ...]]] = deque(maxlen=MOST_NOTES)

    def at(self, when_ms: int, action: Action) -> None:
        """Do `action` at a time; equal times happen in the order in which they were asked for."""
        heapq.heappush(self._heap, (max(when_ms, self.now_ms), next(self._numbers), action))

    def after(self, delay_ms: int, action: Action) -> None:
        self.at(self.now_ms + delay_ms, action)

    def run(self, until_ms: int) -> None:
        """Take every step up to a time."""
        heap = self._heap
        while heap and heap[0][0] <= until_ms:
            self.now_ms, _, action = heapq.heappop(heap)
            self.steps += 1
            action()
        self.now_ms = max(self.now_ms, until_ms)

    def chance(self, of: float) -> bool:
        return of > 0 and self.random.random() < of

    def between(self, least: int, most: int) -> int:
        """A whole number, both ends included; quicker than `randint`."""
        return least + int(self.random.random() * (most - least + 1))

    def note(self, text: str, *arguments: object) -> None:
        """Remember what happened; `text` is a format string."""
        self._notes.append((self.now_ms, self.steps, text, arguments))

    def notes(self, last: int) -> list[str]:
        """The last notes, readable."""
        kept = list(self._notes)[-last:]
        return [f"{at:>7} ms #{step:<6} {text.format(*what)}" for at, step, text, what in kept]


class Clock:
    """What one process reads: boot time that runs at its own rate and may jump forward."""

    __slots__ = ("_ahead_ms", "_rate", "_world")

    def __init__(self, world: World, rate_permille: int = 1000) -> None:
        self._world = world
        self._rate = rate_permille
        self._ahead_ms = 0

    def now(self) -> int:
        return self._ahead_ms + self._world.now_ms * self._rate // 1000

    def world_ms(self, delay_ms: int) -> int:
        """How long a delay on this clock takes in the world."""
        return -(-delay_ms * 1000 // self._rate)

    def jump(self, by_ms: int) -> None:
        """The machine was suspended: this clock went on, and no timer fires early for it."""
        self._ahead_ms += by_ms
