"""Violations that the machine itself sees: recorded, then counted.

Recorded as any operation of the store; the notice comes when it is durable. Nobody waits for
it: that a cheat was refused never depends on whether it could be written down.
"""

from registry_service.core.effects import ViolationSeen
from registry_service.core.pipeline import Answer, StorePipeline
from registry_service.core.transactions import RecordViolation, ViolationRecorded
from registry_service.core.turn import Turn
from steward.model.violations import Violation


class Refusals:
    """Gives violations to the store. `reporter` is `role:id` of this process."""

    def __init__(self, reporter: str, turn: Turn, store: StorePipeline) -> None:
        self._reporter = reporter
        self._turn = turn
        self._store = store

    def record(self, violation: Violation, reporter: str = "") -> None:
        """Keep what this process saw, or what `reporter` did."""
        operation = RecordViolation(violation, reporter or self._reporter)
        self._store.submit(operation, self._recorded)

    def _recorded(self, answer: Answer) -> None:
        assert isinstance(answer.operation, RecordViolation)
        assert isinstance(answer.result, ViolationRecorded)
        operation = answer.operation
        self._turn.emit(
            ViolationSeen(answer.result.number, operation.violation, operation.reporter)
        )
