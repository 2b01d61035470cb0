"""Waiting for a condition of the host, with a deadline: whoever changes something says so.

For one waiter at a time, on one event loop. Times are those of the loop.
"""

import asyncio
from collections.abc import Callable


class Change:
    """Set by everything that may make a condition true; spurious wake-ups cost a look."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()

    async def next(self, deadline: float) -> bool:
        """Wait for the next change; whether there was one before the deadline."""
        self._event.clear()
        try:
            async with asyncio.timeout_at(deadline):
                await self._event.wait()
        except TimeoutError:
            return False
        return True

    async def until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Wait until the condition holds; whether it does at the deadline."""
        while not condition():
            if not await self.next(deadline):
                return condition()
        return True
