"""Violations on their way to the store: those that came by a call, and those that the door saw.

One transaction is in flight; what comes meanwhile travels as the next, so that a flood of
reports costs placements at most one transaction of 256 rows at a time. What waits is bounded:
more is refused with NO_CAPACITY, and the reporter keeps it. Answered when durable.

Not guaranteed: that an answer which is lost was not a success; a report sent again is kept twice.
"""

import asyncio
from asyncio import Future
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from registry_service.core.transactions import (
    Committed,
    Outcome,
    RecordViolation,
    StoreOperation,
    ViolationRecorded,
)
from registry_service.store.port import PlacementStore
from steward.errors import Reason, StewardError
from steward.model.violations import Violation

MOST_WAITING = 4096
MOST_IN_TRANSACTION = 256

AGAIN_S = 60.0
MOST_NOTICED = 256

Finished = Callable[[tuple[StoreOperation, ...], "Future[Outcome]"], Outcome | None]


class ViolationRecorder:
    """Group commits of violations.

    `finished` sees every transaction first, and says its outcome; None when there is none.
    """

    def __init__(self, store: PlacementStore, finished: Finished) -> None:
        self._store = store
        self._finished = finished
        self._waiting: deque[tuple[RecordViolation, Future[int]]] = deque()
        self._in_flight = False
        # What the door saw: when it was recorded last, and how often it was seen since.
        self._noticed: dict[tuple[Violation, str], tuple[float, int]] = {}

    def notice(self, violation: Violation, reporter: str) -> None:
        """Keep what this process saw itself, without waiting; equal ones once a minute.

        A process that is refused comes again each second; its row counts how often.
        """
        now = asyncio.get_running_loop().time()
        last, seen = self._noticed.get((violation, reporter), (now - AGAIN_S, 0))
        if now - last < AGAIN_S:
            self._noticed[violation, reporter] = (last, seen + 1)
            return
        if len(self._noticed) >= MOST_NOTICED:
            self._noticed.clear()
        try:
            self.record([replace(violation, count=seen + 1)], reporter)
        except StewardError:
            return  # It will be seen again, and more urgent ones wait.
        self._noticed[violation, reporter] = (now, 0)

    def record(self, violations: Sequence[Violation], reporter: str) -> "Future[int]":
        """Keep these; the future gives the number of the last one when all are durable.

        `reporter` is `role:id`. The future fails with StewardError(STORE_UNAVAILABLE). Raises
        StewardError(NO_CAPACITY) when too many wait, and then keeps none. Takes at least one.
        """
        if len(self._waiting) + len(violations) > MOST_WAITING:
            raise StewardError(
                Reason.NO_CAPACITY, "too many violations wait for the store; send them later"
            )
        last: Future[int] = asyncio.get_running_loop().create_future()
        for violation in violations:
            last = asyncio.get_running_loop().create_future()
            # Who does not wait for an answer must not be told of a failure in the log.
            last.add_done_callback(_seen)
            self._waiting.append((RecordViolation(violation, reporter), last))
        self._flush()
        return last

    def _flush(self) -> None:
        if self._in_flight or not self._waiting:
            return
        count = min(len(self._waiting), MOST_IN_TRANSACTION)
        batch = [self._waiting.popleft() for _ in range(count)]
        operations = tuple(operation for operation, _ in batch)
        self._in_flight = True
        self._store.commit(operations).add_done_callback(
            lambda done: self._commit_done(operations, [answer for _, answer in batch], done)
        )

    def _commit_done(
        self,
        operations: tuple[StoreOperation, ...],
        answers: list["Future[int]"],
        done: "Future[Outcome]",
    ) -> None:
        self._in_flight = False
        outcome = self._finished(operations, done)
        if isinstance(outcome, Committed):
            for answer, result in zip(answers, outcome.results, strict=True):
                assert isinstance(result, ViolationRecorded)
                if not answer.done():
                    answer.set_result(result.number)
        else:
            for answer in answers:
                if not answer.done():
                    error = StewardError(Reason.STORE_UNAVAILABLE, "the store did not answer")
                    answer.set_exception(error)
        self._flush()


def _seen(answer: "Future[int]") -> None:
    if not answer.cancelled():
        answer.exception()
