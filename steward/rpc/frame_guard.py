"""How long a server puts up with the other end of a framed connection.

A client says hello soon, and then something now and then: one that is gone without a word is
known here long before TCP knows it. One whose connection ends may read the last message first,
but not for as long as it likes.
"""

import asyncio
from collections.abc import Callable

from steward.rpc.frames import FrameConnection

MOST_HELLO_BYTES = 64 * 1024
"""A stranger may not make a server hold more than this."""
SILENT_S = 15.0
"""Clients ping several times a second: one that says nothing for so long is not there any more."""


class FrameGuard:
    """The timer of one connection; one event loop. Its owner sets `heard` with each message."""

    __slots__ = ("_connection", "_hello_s", "_loop", "_timer", "heard")

    def __init__(
        self, connection: FrameConnection, hello_s: float, too_late: Callable[[], None]
    ) -> None:
        """`too_late` is called when there was neither `welcomed` nor `end` in `hello_s`."""
        self._connection = connection
        self._hello_s = hello_s
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(hello_s, too_late)
        self.heard = False

    def welcomed(self, silent_s: float, gone: str) -> None:
        """From now on it may be silent for so long; then the connection is over: `gone`.

        What nobody reads here is not held against it.
        """
        if not self.heard and not self._connection.paused:
            self._connection.abort(gone)
            return
        self.heard = False
        self._wait(silent_s, lambda: self.welcomed(silent_s, gone))

    def end(self, why: str) -> None:
        """End the connection after what was sent, or as if it had been: it may never be read."""
        self._connection.close()
        self._wait(self._hello_s, lambda: self._connection.abort(why))

    def over(self) -> None:
        """The connection is over."""
        self._timer.cancel()

    def _wait(self, seconds: float, action: Callable[[], None]) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_later(seconds, action)
