"""Which violations the store on etcd keeps, and how much of the ledger.

Both are bounded, because etcd holds all that it has in memory. Of violations the oldest refusals
go first, and breaches only when there is nothing else, as in every store; of the ledger the newest
rows stay (other engines keep all: who must keep all from here follows it with a watch).
"""

import logging
from collections import deque

from registry_service.store.etcd_keys import Head, Keys, dump_violation, number_of
from registry_service.store.etcd_writes import Writes
from registry_service.store.violation_table import KEEP, violation_row
from steward.model.violations import Severity, Violation
from steward.telemetry.logs import fields

KEEP_ROWS = 100_000
_CUT_EVERY = 1_000

_log = logging.getLogger(__name__)


class Kept:
    """Numbers of the violations that are there, in the memory of the writer."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.most_violations = KEEP
        self.most_rows = KEEP_ROWS
        self.numbers: dict[Severity, deque[int]] = {each: deque() for each in Severity}

    def load(self, key: bytes) -> None:
        """This key is there. Keys of a severity come in the order of their numbers."""
        numbers, number = self._of(key), number_of(key)
        if not numbers or numbers[-1] < number:
            numbers.append(number)

    def unload(self, key: bytes) -> None:
        numbers, number = self._of(key), number_of(key)
        while numbers and numbers[0] <= number:
            numbers.popleft()

    def _of(self, key: bytes) -> deque[int]:
        severity = next(each for each in Severity if key.startswith(self._keys.of_severity(each)))
        return self.numbers[severity]

    def record(self, head: Head, violation: Violation, reporter: str, writes: Writes) -> int:
        """Keep a violation; returns its number."""
        severity = violation.severity
        head.violations += 1
        if severity is Severity.BREACH:
            head.breaches += violation.count
        else:
            head.refusals += violation.count
        row = violation_row(head.violations, writes.at_ms, violation, reporter)
        self.numbers[severity].append(row.number)
        writes.put(self._keys.violation(severity, row.number), dump_violation(row))
        return row.number

    def finish(self, rows_before: int, head: Head, writes: Writes) -> None:
        """End of a transaction: what is too much goes with it."""
        self._drop(Severity.REFUSAL, writes)
        dropped = self._drop(Severity.BREACH, writes)
        if dropped:
            _log.error(
                "recorded breaches were dropped: there are too many",
                extra=fields(
                    dropped=dropped,
                    do="raise registry.kept_violations, and look at what makes so many",
                ),
            )
        if rows_before // _CUT_EVERY != head.ledger // _CUT_EVERY:
            oldest = head.ledger - self.most_rows
            if oldest > 0:
                # A key has the number of its last row: no row that is kept goes with it.
                writes.cuts.append((self._keys.row(0), self._keys.row(oldest)))

    def _drop(self, severity: Severity, writes: Writes) -> int:
        numbers = self.numbers[severity]
        too_many = sum(map(len, self.numbers.values())) - self.most_violations
        dropped = 0
        while dropped < too_many and numbers:
            writes.delete(self._keys.violation(severity, numbers.popleft()))
            dropped += 1
        return dropped
