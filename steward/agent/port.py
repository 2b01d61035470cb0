"""What a `Run` needs of the host that executes it.

The facade knows no thread, queue or log: the host implements `RunPort`, and a test may
implement it with a list.
"""

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Protocol

from steward.model.verbs import EventType


class RunCancelled(asyncio.CancelledError):
    """The run is over: it was cancelled, fenced, or has ended. Nothing that it asks for happens.

    Raised by every verb from then on, so that code which swallows one gets the next.
    """


class Branch(Enum):
    """Where in the code of a run a verb is called: what may happen in another order next time."""

    ALONE = "alone"
    """In the agent's own task or thread, and no other of the run is there."""

    MAIN = "main"
    """In the agent's own task or thread, while others may call verbs too."""

    OTHER = "other"
    """In a task or thread that the agent has started."""


class RunPort(Protocol):
    """One execution of a run. All methods are called on the loop that runs agent code."""

    async def append(
        self,
        type: EventType,
        data: bytes,
        tool_call_id: str = "",
        state: bytes = b"",
        steps: Sequence[tuple[str, bytes]] = (),
    ) -> int:
        """Put one event into the window and return its number; waits while the window is full.

        `steps` are kept as by `record_step`, put directly before the event. When this raises,
        nothing was put. Raises RunCancelled when the run is over.
        """
        ...

    def append_now(self, type: EventType, data: bytes, tool_call_id: str = "") -> None:
        """The same without waiting, for code that is being cancelled; a no-op when it is over."""
        ...

    async def record_step(self, step_id: str, value: bytes) -> int:
        """Keep a value (JSON) for later attempts of this run. Otherwise as `append`."""
        ...

    async def repeat_call(self, tool_call_id: str) -> int:
        """Renew the intent of a call that an earlier attempt announced. Otherwise as `append`."""
        ...

    async def acknowledged(self, number: int) -> None:
        """Wait until all verbs up to `number` are in the log; 0 waits for none.

        Raises RunCancelled when the run is over.
        """
        ...

    def branch(self) -> Branch:
        """Where the task that asks stands among those of this run."""
        ...

    async def in_thread(self, call: Callable[[], Any]) -> Any:
        """Run blocking code in a thread. Raises what it raised."""
        ...
