"""The way of operations to the store: what waits travels together, few batches in flight.

No timer: while the allowed number of batches is in flight, what arrives collects, and
the next batch takes it, up to its limit: that of the configuration, or of the engine if that is
lower. Fences and handoffs go first. An unknown result sends
the same operations again (they are idempotent), which is the linear re-read of P7.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from registry_service.core.commands import TransactionId
from registry_service.core.effects import Commit, Halt
from registry_service.core.transactions import (
    Committed,
    Outcome,
    StoreOperation,
    StoreResult,
    StoreView,
    TermLost,
    Unknown,
)
from registry_service.core.turn import Turn
from steward.model.keys import Revision

Subject = TypeVar("Subject")


class Answer:
    """One operation on its way to the store, and then what came of it.

    `repeated_since` is None after the first attempt; else the revision that was known when it was
    first sent, so that a change found above it was made by an earlier attempt.
    """

    __slots__ = ("_result", "make", "operation", "repeated", "since", "subject", "then")

    def __init__(
        self,
        operation: StoreOperation | None,
        make: Callable[[Any], StoreOperation | None] | None,
        subject: Any,
        then: Callable[["Answer"], None],
    ) -> None:
        # None until the batch is made, for those that are decided then.
        self.operation = operation
        self.make = make
        # What it is about, for who asked.
        self.subject = subject
        self.then = then
        self.repeated = False
        self.since: Revision | None = None
        self._result: StoreResult | None = None

    @property
    def repeated_since(self) -> Revision | None:
        return self.since if self.repeated else None

    @property
    def result(self) -> StoreResult:
        assert self._result is not None
        return self._result

    def tell(self, result: StoreResult) -> None:
        """Hand the result to who asked."""
        self._result = result
        self.then(self)


Then = Callable[[Answer], None]


class StorePipeline:
    """Queues operations, makes batches of them, and hands each result to who asked."""

    def __init__(self, turn: Turn, batch: int, in_flight: int) -> None:
        self._turn = turn
        self._batch = batch
        self._most_in_flight = in_flight
        # Two queues, each in order: what goes first, and all else.
        self._urgent: deque[Answer] = deque()
        self._waiting: deque[Answer] = deque()
        self._in_flight: dict[TransactionId, list[Answer]] = {}
        self._last = 0

    def recover(self, view: StoreView) -> None:
        """A batch takes no more than one transaction of this engine does."""
        self._batch = min(self._batch, view.most_operations)

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
        (self._urgent if first else self._waiting).append(Answer(operation, None, None, then))

    def submit_late(
        self,
        make: Callable[[Subject], StoreOperation | None],
        subject: Subject,
        then: Then,
        *,
        first: bool = False,
    ) -> None:
        """Queue an operation that `make(subject)` decides when its batch is made, or drops."""
        (self._urgent if first else self._waiting).append(Answer(None, make, subject, then))

    def flush(self) -> None:
        """Start batches while there is something to do and room in flight."""
        urgent, waiting = self._urgent, self._waiting
        while (urgent or waiting) and len(self._in_flight) < self._most_in_flight:
            works: list[Answer] = []
            operations: list[StoreOperation] = []
            while (urgent or waiting) and len(works) < self._batch:
                work = (urgent or waiting).popleft()
                if work.since is None:
                    if work.make is not None:
                        work.operation = work.make(work.subject)
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
                    work.tell(result)
            case Unknown():
                for work in works:
                    work.repeated = True
                self._urgent.extendleft(reversed(works))
            case TermLost(term):
                self._turn.emit(Halt(f"another registry process holds the store (term {term})"))
