"""What steps of managers lead to goes out together: after a batch of steps, or once per loop turn.

A step alone (a command of an edge) collects, and what it collected leaves at the end of this
turn of the loop. Many steps that came together (verbs of many users in one crossing, the
answers of the log) are taken within `with turn:`, and what they collected leaves at its end:
one message to the log, one crossing to the agents, however many users they are of, and no
further turn of the loop for it.

Guarantees: whether this node may still act is asked once more before anything leaves.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType


class Turn:
    """One for all managers of a node. One event loop."""

    __slots__ = ("_depth", "_due", "_leave", "_silent")

    def __init__(self, silent: Callable[[], bool]) -> None:
        """`silent`: whether nothing may go out any more."""
        self._silent = silent
        self._leave: list[Callable[[], None]] = []
        self._depth = 0
        self._due = False

    def ends_with(self, leave: Callable[[], None]) -> None:
        """Call `leave` at each end, after those that were given before. It may find nothing."""
        self._leave.append(leave)

    def collected(self) -> None:
        """Something waits for the end of this turn."""
        if not self._depth and not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._end)

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Also after an error: what the steps before it led to is as good as without it.
        self._depth -= 1
        if not self._depth:
            self._end()

    def _end(self) -> None:
        self._due = False
        if not self._silent():
            for leave in self._leave:
                leave()
