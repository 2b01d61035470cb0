"""What a `Run` needs of the host that executes it.

The facade knows no thread, queue or log: the host implements `RunPort`, and a test may
implement it with a list.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from steward.model.verbs import EventType


class RunCancelled(asyncio.CancelledError):
    """The run is over: it was cancelled, fenced, or has ended. Nothing that it asks for happens.

    Raised by every verb from then on, so that code which swallows one gets the next.
    """


class RunPort(Protocol):
    """One execution of a run. All methods are called on the loop that runs agent code."""

    async def append(
        self, type: EventType, data: bytes, tool_call_id: str = "", state: bytes = b""
    ) -> int:
        """Put one event into the window and return its number; waits while the window is full.

        When this raises, nothing was put. Raises RunCancelled when the run is over.
        """
        ...

    def append_now(self, type: EventType, data: bytes, tool_call_id: str = "") -> None:
        """The same without waiting, for code that is being cancelled; a no-op when it is over."""
        ...

    async def acknowledged(self, number: int) -> None:
        """Wait until all verbs up to `number` are in the log. Raises RunCancelled."""
        ...

    async def in_thread(self, call: Callable[[], Any]) -> Any:
        """Run blocking code in a thread. Raises what it raised."""
        ...
