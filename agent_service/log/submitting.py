"""What every engine of the event log does with what is asked of it, until it has an outcome.

Operations that were submitted together stay together (`Work`), are bounded in number, and are
told their outcomes once, in order. An engine that failed for good says so to everybody who
waits and to all who come later. How work is committed is the engine's own: it takes what
`_put` is given, and calls `_deliver` or `_fail` and `_settle`, all on the event loop.
"""

import asyncio
import logging
from asyncio import Future
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from agent_service.core.journal import Append, AppendOutcome, Seal, SealOutcome
from agent_service.log.port import Done, LogFailed, LogFull, Operation, Outcome
from agent_service.log.rules import MOST_WAITING, check_append, check_seal

_logger = logging.getLogger("steward.log")


Submit = Callable[[Sequence[Operation], int, Done], None]
"""`submit` of the `EventLog` port."""


class OneByOne:
    """`append` and `seal` of the `EventLog` port, by its `submit`. One event loop."""

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._futures: set[Future[Outcome]] = set()

    def append(self, append: Append) -> "Future[AppendOutcome]":
        """Start a fenced append. As in the port."""
        return cast("Future[AppendOutcome]", self._start(append, check_append(append)))

    async def seal(self, seal: Seal) -> SealOutcome:
        """Raise the fence and read the start, atomically. As in the port."""
        check_seal(seal)
        return cast(SealOutcome, await self._start(seal, 0))

    def _start(self, operation: Operation, size: int) -> "Future[Outcome]":
        future: Future[Outcome] = asyncio.get_running_loop().create_future()

        def done(outcomes: Sequence[Outcome] | LogFailed) -> None:
            self._futures.discard(future)
            if future.done():
                return
            if isinstance(outcomes, LogFailed):
                future.set_exception(outcomes)
            else:
                future.set_result(outcomes[0])

        self._submit((operation,), size, done)
        self._futures.add(future)
        return future

    def cancel(self) -> None:
        """Nobody is told any more: the outcome of what has none is unknown."""
        for future in list(self._futures):
            future.cancel()
        self._futures.clear()


@dataclass(frozen=True, slots=True)
class Work:
    """Operations that were submitted together, their bytes, and whom to tell the outcomes."""

    operations: Sequence[Operation]
    size: int
    done: Done


class Submitting:
    """The side of an engine that callers see. One event loop."""

    def __init__(self) -> None:
        self._one_by_one = OneByOne(self.submit)
        self._waiting = 0
        self._closed = False
        self._failure: LogFailed | None = None
        self._failed = asyncio.Event()

    def _put(self, work: Work) -> None:
        """Queue it for the engine."""
        raise NotImplementedError

    def submit(self, operations: Sequence[Operation], size: int, done: Done) -> None:
        """Queue operations, checked before, that carry `size` bytes. `done` runs on the loop.

        Raises LogFull. The cheap way in for a stream that has many at once.
        """
        if self._failure is not None:
            asyncio.get_running_loop().call_soon(done, self._failure)
            return
        if self._closed:
            raise RuntimeError("the event log is closed")
        if self._waiting + len(operations) > MOST_WAITING:
            raise LogFull(f"{self._waiting} operations wait")
        self._waiting += len(operations)
        self._put(Work(operations, size, done))

    def append(self, append: Append) -> "Future[AppendOutcome]":
        """Start a fenced append. As in the port."""
        return self._one_by_one.append(append)

    async def seal(self, seal: Seal) -> SealOutcome:
        """Raise the fence and read the start, atomically. As in the port."""
        return await self._one_by_one.seal(seal)

    async def failed(self) -> LogFailed:
        """Returns when the engine failed for good."""
        await self._failed.wait()
        assert self._failure is not None
        return self._failure

    def _deliver(self, works: Sequence[Work], outcomes: Sequence[Outcome]) -> None:
        """The outcomes of all operations of these works, in their order."""
        at = 0
        for work in works:
            end = at + len(work.operations)
            self._settle(work, outcomes[at:end])
            at = end

    def _settle(self, work: Work, outcomes: Sequence[Outcome] | LogFailed) -> None:
        self._waiting -= len(work.operations)
        work.done(outcomes)

    def _fail(self, error: Exception) -> LogFailed:
        """Remember that the engine is done for."""
        if self._failure is None:
            _logger.critical("event log failed for good: %s", error)
            self._failure = LogFailed(f"event log failed: {error}")
            self._failed.set()
        return self._failure
