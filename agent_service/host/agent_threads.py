"""A bounded set of daemon threads for agents' blocking code.

Unlike `concurrent.futures`, a thread that never returns does not hold up the end of the
process, and it costs a thread, not a place: when its caller is cancelled the place is
given to another. When all places are taken, callers wait on the agent loop, first come
first served; when `STUCK_FACTOR` times as many threads are stuck, calls are refused. A
thread can't be stopped from outside; what it returns after its caller has gone is dropped.
"""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

STUCK_FACTOR = 8

_Done = asyncio.Future[tuple[Any, BaseException | None]]
_Job = tuple[Callable[[], Any], _Done, contextvars.Context]


class AgentThreads:
    """Runs blocking calls for coroutines of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int, name: str) -> None:
        """At most `limit` calls run at once, not counting those written off."""
        self._loop = loop
        self._limit = limit
        self._name = name
        self._places = asyncio.Semaphore(limit)
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._idle = 0
        self._alive = 0
        self._closed = False

    async def run(self, call: Callable[[], Any]) -> Any:
        """The value of `call()`, made in a thread with the caller's context variables.

        Raises what it raised. When the caller is cancelled the thread goes on, and its place
        is free again.
        """
        async with self._places:
            if self._closed:
                raise RuntimeError("the threads of agents are closed")
            done: _Done = self._loop.create_future()
            if self._idle == 0:
                if self._alive >= self._limit * STUCK_FACTOR:
                    raise RuntimeError(f"{self._alive} threads of agents are stuck; no new one")
                self._alive += 1
                threading.Thread(
                    target=self._work, name=f"{self._name}-{self._alive}", daemon=True
                ).start()
            else:
                self._idle -= 1
            self._jobs.put((call, done, contextvars.copy_context()))
            value, error = await done
            if error is not None:
                # Raised here and not by the future: GeneratorExit would break the coroutine.
                raise error
            return value

    def close(self) -> None:
        """Let idle threads end; busy ones end after their call. Safe to call twice."""
        self._closed = True
        for _ in range(self._idle):
            self._jobs.put(None)
        self._idle = 0

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            call, done, context = job
            value: Any = None
            error: BaseException | None = None
            try:
                # Nothing starts for a caller that has gone.
                value = None if done.cancelled() else context.run(call)
            except StopIteration as stop:
                # A coroutine can't raise it.
                error = RuntimeError(f"agent code raised StopIteration: {stop.value!r:.80}")
            except BaseException as raised:
                error = raised
            job = call = context = None  # type: ignore[assignment]
            try:
                self._loop.call_soon_threadsafe(self._finish, done, value, error)
            except RuntimeError:
                return
            value = error = done = None  # type: ignore[assignment]

    def _finish(self, done: _Done, value: Any, error: BaseException | None) -> None:
        if self._closed:
            self._jobs.put(None)
        else:
            self._idle += 1
        if not done.done():
            done.set_result((value, error))
