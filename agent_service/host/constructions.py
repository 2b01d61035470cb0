"""Managers that somebody tried to make by hand, heard wherever in this process it was tried.

A refused construction raises an audit event (`sys.audit`), in the thread of whoever tried;
a watch brings it to the host's loop, so that it is counted and reaches the ledger. A hook
of Python's audit can't be taken out again: a closed watch hears nothing, and stays.
"""

import asyncio
import sys
from collections.abc import Callable

from agent_service.core.grants import AUDIT_EVENT


class ConstructionWatch:
    """Calls `report(how)` on the running loop for each refused construction, until closed."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._report: Callable[[str], None] | None = report
        sys.addaudithook(self._hear)

    def close(self) -> None:
        """Hear nothing any more. Safe to call twice; before the loop is closed."""
        self._report = None

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        report = self._report
        if event == AUDIT_EVENT and report is not None:
            self._loop.call_soon_threadsafe(report, str(arguments[0]))
