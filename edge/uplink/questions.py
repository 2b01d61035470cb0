"""Questions under way to a peer: each ends with an answer, a refusal, or its deadline."""

import asyncio
from collections.abc import Iterator
from itertools import count
from typing import Any

from steward.errors import Reason, StewardError

SWEEP_S = 0.25


class Questions:
    """Futures by number. One timer for all of them, and none while there are none."""

    def __init__(self, peer: str, deadline_s: float) -> None:
        self._peer = peer
        self._deadline_s = deadline_s
        self._loop = asyncio.get_running_loop()
        self._ids: Iterator[int] = count(1)
        self._waiting: dict[int, tuple[float, asyncio.Future[Any]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def ask(self) -> tuple[int, "asyncio.Future[Any]"]:
        """A new number and the future of its answer."""
        number = next(self._ids)
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting[number] = (self._loop.time() + self._deadline_s, future)
        if self._timer is None:
            self._timer = self._loop.call_later(SWEEP_S, self._sweep)
        return number, future

    def waits(self, number: int) -> bool:
        return number in self._waiting

    def answer(self, number: int, value: Any) -> None:
        """End one: with a value, or with a StewardError as its exception. Unknown: nothing."""
        waiting = self._waiting.pop(number, None)
        if waiting is None or waiting[1].done():
            return
        if isinstance(value, StewardError):
            waiting[1].set_exception(value)
        else:
            waiting[1].set_result(value)

    def fail_all(self) -> None:
        """The peer is gone: nobody will answer these."""
        for number in list(self._waiting):
            self.answer(number, self._away("can't be reached right now"))

    def close(self) -> None:
        self.fail_all()
        if self._timer is not None:
            self._timer.cancel()

    def _away(self, what: str) -> StewardError:
        return StewardError(Reason.MANAGER_UNAVAILABLE, f"{self._peer} {what}", retry_after_ms=1000)

    def _sweep(self) -> None:
        self._timer = None
        now = self._loop.time()
        # In the order of asking, so of deadlines.
        for number, (deadline, _) in list(self._waiting.items()):
            if deadline > now:
                break
            self.answer(number, self._away("did not answer in time"))
        if self._waiting:
            self._timer = self._loop.call_later(SWEEP_S, self._sweep)
