"""`EventBuffer`: events between the connection, which must not wait long, and a reader, who may.

Bounded. When it is full the client stops reading its socket and waits for room, which
in the end makes the server close with SLOW_CONSUMER and the client resume: nothing is
lost. A buffer whose reader does not come at all is given up instead, so that one
forgotten reader can't stop the others: it keeps no more events, and its reader gets
what it holds and then StewardError(SLOW_CONSUMER). Nothing is skipped silently.
"""

import asyncio
from collections import deque

from steward.client.events import Event
from steward.errors import Reason, StewardError


class EventBuffer:
    """One reader, one writer, one event loop. The first `end` counts."""

    __slots__ = ("_end", "_ended", "_events", "_limit", "_reader", "_space", "was_read")

    def __init__(self, limit: int) -> None:
        self._events: deque[Event] = deque()
        self._limit = limit
        self.was_read = False
        self._reader: asyncio.Future[None] | None = None
        self._space = asyncio.Event()
        self._ended = False
        self._end: BaseException | None = None

    @property
    def full(self) -> bool:
        """Whether the writer should wait for `room` before it puts more."""
        return not self._ended and len(self._events) >= self._limit

    @property
    def ended(self) -> bool:
        return self._ended

    def put(self, event: Event) -> None:
        """Add an event, even when full: the writer asks for room between its reads."""
        if not self._ended:
            self._events.append(event)
            self._wake_reader()

    def clear(self) -> None:
        """Forget what was not read yet."""
        self._events.clear()
        self._space.set()

    def end(self, error: BaseException | None = None) -> None:
        """No more events: after what is held the reader gets `error`, or just the end."""
        if not self._ended:
            self._ended, self._end = True, error
            self._space.set()
            self._wake_reader()

    async def room(self, seconds: float) -> None:
        """Wait until there is room; give the reader up when there is none in `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while self.full:
                    self._space.clear()
                    await self._space.wait()
        except TimeoutError:
            text = (
                f"{len(self._events)} events were not read within {seconds:g} s; resume after them"
            )
            self.end(StewardError(Reason.SLOW_CONSUMER, text))

    async def get(self) -> Event | None:
        """The next event; None at the end. Raises the error that it was ended with."""
        if self._reader is not None:
            raise RuntimeError("another task reads these events already")
        self.was_read = True
        while not self._events:
            if self._ended:
                if self._end is not None:
                    raise self._end
                return None
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        event = self._events.popleft()
        if not self.full:
            self._space.set()
        return event

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
