"""What one node sends, on its way into the engine, and the outcomes on theirs back.

Whichever way a node is connected: what came in one message goes to the engine as one
piece; an `Intake` has at most `MOST_IN_FLIGHT` operations between being read and being
answered (or one message of more), and whoever reads must ask `has_room` first. A write
that the fence or the sequence refuses is reported by this side too, since whoever tried
it may be the last one to tell.
"""

from collections.abc import Callable, Sequence
from functools import partial

from agent_service.core.journal import Append, Conflict, Fenced
from agent_service.log.answers import Answered
from agent_service.log.convert import append_from, seal_from
from agent_service.log.port import LogEngine, LogFailed, LogFull, Operation, Outcome
from agent_service.log.spans import UNTRACED, watched
from steward.errors import Reason, StewardError
from steward.model.violations import Violation, ViolationKind
from steward.telemetry.tracing import Tracing
from steward.v1 import log_service_pb2

MOST_IN_FLIGHT = 8192
LOG_FAILED = StewardError(Reason.STORE_UNAVAILABLE, "the event log failed and is about to end")

_REFUSED = (Fenced, Conflict)


class Intake:
    """One node's operations. One event loop."""

    def __init__(
        self,
        log: LogEngine,
        node_id: str,
        report: Callable[[Violation], None],
        answered: Callable[[Answered], None],
        failed: Callable[[StewardError], None],
        tracing: Tracing = UNTRACED,
    ) -> None:
        """`answered` is told of each message's outcomes, `failed` that there will be none."""
        self._log = log
        self._node_id = node_id
        self._report = report
        self._answered = answered
        self._failed = failed
        self._tracing = tracing
        self._in_flight = 0

    def has_room(self, batch: log_service_pb2.LogBatch) -> bool:
        """Whether this message may be submitted now."""
        number = len(batch.seals) + len(batch.appends)
        return not self._in_flight or self._in_flight + number <= MOST_IN_FLIGHT

    def submit(self, batch: log_service_pb2.LogBatch) -> None:
        """Give the engine a message. Raises StewardError for one that breaks the rules."""
        operations: list[Operation] = [seal_from(message) for message in batch.seals]
        size = 0
        for message in batch.appends:
            append, its_size = append_from(message)
            operations.append(append)
            size += its_size
        if not operations:
            return
        seals = [message.request_id for message in batch.seals]
        appends = [message.request_id for message in batch.appends]
        try:
            done = partial(self._done, seals, appends, operations)
            self._log.submit(operations, size, watched(self._tracing, operations, done))
        except LogFull as error:
            raise StewardError(Reason.STORE_UNAVAILABLE, str(error)) from None
        self._in_flight += len(operations)

    def sent(self, answered: Sequence[Answered]) -> None:
        """These outcomes are on their way to the node."""
        for item in answered:
            self._in_flight -= len(item.outcomes)

    def _done(
        self,
        seals: list[int],
        appends: list[int],
        operations: list[Operation],
        outcomes: Sequence[Outcome] | LogFailed,
    ) -> None:
        if isinstance(outcomes, LogFailed):
            self._failed(LOG_FAILED)
            return
        for operation, outcome in zip(operations, outcomes, strict=True):
            if isinstance(outcome, _REFUSED):
                self._report(_refused(operation, outcome, self._node_id))
        self._answered(Answered(seals, appends, outcomes))


def _refused(operation: Operation, outcome: Fenced | Conflict, node_id: str) -> Violation:
    if not isinstance(operation, Append):
        kind, what = ViolationKind.STALE_SEAL, f"seal by {operation.activation}"
    elif isinstance(outcome, Fenced):
        kind, what = ViolationKind.STALE_APPEND, f"append {operation.append_number}"
    else:
        kind, what = ViolationKind.APPEND_CONFLICT, f"append at {operation.expected_sequence}"
    met = (
        f"fence {outcome.fence}"
        if isinstance(outcome, Fenced)
        else f"a stream whose next is {outcome.next_sequence}"
    )
    evidence = f"{what} of {node_id!r} met {met}"
    return Violation(kind, evidence, operation.user, operation.epoch)
