"""Waiting for a condition, with a deadline and words for its failure; never for a time alone."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

POLL_S = 0.01


async def eventually(condition: Callable[[], Any], what: str, within_s: float = 10.0) -> Any:
    """Poll until `condition` gives something true, and return that.

    The condition may be async. Raises TimeoutError with `what` after the deadline.
    """
    until = time.monotonic() + within_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > until:
            raise TimeoutError(f"not within {within_s:g} s: {what}")
        await asyncio.sleep(POLL_S)


def wait_for(condition: Callable[[], Any], within_s: float, what: str) -> Any:
    """The same for code without an event loop. Raises TimeoutError."""
    until = time.monotonic() + within_s
    while True:
        if value := condition():
            return value
        if time.monotonic() > until:
            raise TimeoutError(f"not within {within_s:g} s: {what}")
        time.sleep(POLL_S)
