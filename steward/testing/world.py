"""A seeded world: virtual time, one heap of things to come, and links that delay but keep order.

Everything that happens is a step; the same seed gives the same steps. There is no
clock, no thread and no I/O, so a hundred seconds of a cluster take a fraction of one.
"""

import heapq
import itertools
import random
from collections.abc import Callable

Action = Callable[[], None]


class World:
    """Virtual time in milliseconds, and what will happen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_ms = 1_000
        self.steps = 0
        self._numbers = itertools.count()
        self._heap: list[tuple[int, int, Action]] = []

    def at(self, when_ms: int, action: Action) -> None:
        """Do `action` at a time; equal times happen in the order in which they were asked for."""
        heapq.heappush(self._heap, (max(when_ms, self.now_ms), next(self._numbers), action))

    def after(self, delay_ms: int, action: Action) -> None:
        self.at(self.now_ms + delay_ms, action)

    def run(self, until_ms: int, check: Callable[[], None]) -> None:
        """Take every step up to a time; `check` runs after each one."""
        while self._heap and self._heap[0][0] <= until_ms:
            self.now_ms, _, action = heapq.heappop(self._heap)
            self.steps += 1
            action()
            check()
        self.now_ms = max(self.now_ms, until_ms)


class Link:
    """One direction of a stream: each message is late by its own luck, none overtakes another."""

    def __init__(self, world: World, least_ms: int, most_ms: int) -> None:
        self._world = world
        self._least_ms = least_ms
        self._most_ms = most_ms
        self._free_ms = 0

    def send(self, action: Action) -> None:
        delay_ms = self._world.random.randint(self._least_ms, self._most_ms)
        self._free_ms = max(self._free_ms, self._world.now_ms + delay_ms)
        self._world.at(self._free_ms, action)
