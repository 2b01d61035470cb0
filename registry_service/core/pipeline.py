"""The way of operations to the store: what waits travels together, few batches in flight.

No timer: while the allowed number of batches is in flight, what arrives collects, and
the next batch takes it, up to its limit. Fences and handoffs go first. An unknown result sends
the same operations again (they are idempotent), which is the linear re-read of P7.
"""

from collections import deque
from collections.abc import Callable

from registry_service.core.commands import TransactionId
from registry_service.core.effects import Commit, Halt
from registry_service.core.transactions import (
    Committed,
    Outcome,
    StoreOperation,
    StoreResult,
    TermLost,
    Unknown,
)
from registry_service.core.turn import Turn
from steward.model.keys import Revision

Make = Callable[[], StoreOperation | None]


class Answer:
    """The result of one operation.

    `repeated_since` is None after the first attempt; else the revision that was known when it was
    first sent, so that a change found above it was made by an earlier attempt.
    """

    __slots__ = ("operation", "repeated_since", "result")

    def __init__(
        self, operation: StoreOperation, result: StoreResult, repeated_since: Revision | None
    ) -> None:
        self.operation = operation
        self.result = result
        self.repeated_since = repeated_since


Then = Callable[[Answer], None]


class _Work:
    __slots__ = ("make", "operation", "repeated", "since", "then")

    def __init__(self, make: Make, then: Then) -> None:
        self.make = make
        self.then = then
        self.operation: StoreOperation | None = None
        self.repeated = False
        self.since = Revision(0)


class StorePipeline:
    """Queues operations, makes batches of them, and hands each result to who asked."""

    def __init__(self, turn: Turn, batch: int, in_flight: int) -> None:
        self._turn = turn
        self._batch = batch
        self._most_in_flight = in_flight
        # Two queues, each in order: what goes first, and all else.
        self._urgent: deque[_Work] = deque()
        self._waiting: deque[_Work] = deque()
        self._in_flight: dict[TransactionId, list[_Work]] = {}
        self._last = 0

    @property
    def idle(self) -> bool:
        return not self._urgent and not self._waiting and not self._in_flight

    @property
    def depth(self) -> int:
        """Operations that wait or are in flight."""
        in_flight = sum(len(works) for works in self._in_flight.values())
        return len(self._urgent) + len(self._waiting) + in_flight

    def submit(self, operation: StoreOperation, then: Then, *, first: bool = False) -> None:
        """Queue an operation; `first` puts it before all that wait."""
        self.submit_late(lambda: operation, then, first=first)

    def submit_late(self, make: Make, then: Then, *, first: bool = False) -> None:
        """Queue an operation that is decided when its batch is made; None then drops it."""
        (self._urgent if first else self._waiting).append(_Work(make, then))

    def flush(self) -> None:
        """Start batches while there is something to do and room in flight."""
        urgent, waiting = self._urgent, self._waiting
        while (urgent or waiting) and len(self._in_flight) < self._most_in_flight:
            works: list[_Work] = []
            operations: list[StoreOperation] = []
            while (urgent or waiting) and len(works) < self._batch:
                work = (urgent or waiting).popleft()
                if work.operation is None:
                    work.operation = work.make()
                    work.since = self._turn.revision
                if work.operation is not None:
                    works.append(work)
                    operations.append(work.operation)
            if works:
                self._last += 1
                transaction = TransactionId(self._last)
                self._in_flight[transaction] = works
                self._turn.commit(Commit(transaction, tuple(operations)))

    def finish(self, transaction: TransactionId, outcome: Outcome) -> None:
        """Take the outcome of a batch. An outcome that was taken before is ignored."""
        works = self._in_flight.pop(transaction, None)
        if works is None:
            return
        match outcome:
            case Committed(results, revision):
                self._turn.revision = max(self._turn.revision, revision)
                for work, result in zip(works, results, strict=True):
                    assert work.operation is not None
                    work.then(Answer(work.operation, result, work.since if work.repeated else None))
            case Unknown():
                for work in works:
                    work.repeated = True
                self._urgent.extendleft(reversed(works))
            case TermLost(term):
                self._turn.emit(Halt(f"another registry process holds the store (term {term})"))
