"""Spans of what the log commits, for traces that are kept.

An append names those of its events whose trace is sampled, and a seal who waits for it: from
coming in to being durable, each is a span. Others cost one look at an empty field.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial

from agent_service.core.journal import Append, Committed, Sealed
from agent_service.log.port import Done, LogFailed, Operation, Outcome
from steward.telemetry import conventions as names
from steward.telemetry.tracing import Attribute, Kind, Tracing

UNTRACED = Tracing()


def watched(tracing: Tracing, operations: Sequence[Operation], done: Done) -> Done:
    """`done`, which records the spans of these operations first, if there are any."""
    if not tracing.enabled or not any(
        operation.traces if isinstance(operation, Append) else operation.traceparent
        for operation in operations
    ):
        return done
    return partial(_record, tracing, operations, done, time.time_ns())


def _record(
    tracing: Tracing,
    operations: Sequence[Operation],
    done: Done,
    began_ns: int,
    outcomes: Sequence[Outcome] | LogFailed,
) -> None:
    if not isinstance(outcomes, LogFailed):
        for operation, outcome in zip(operations, outcomes, strict=True):
            failed = not isinstance(outcome, Committed | Sealed)
            if isinstance(operation, Append):
                for sequence, trace in operation.traces:
                    attributes = {names.SEQUENCE: sequence, names.EPOCH: operation.epoch}
                    _end(tracing, names.LOG_COMMIT, trace, began_ns, attributes, failed)
            elif operation.traceparent:
                trace, attributes = operation.traceparent, {names.EPOCH: operation.epoch}
                _end(tracing, names.LOG_SEAL, trace, began_ns, attributes, failed)
    done(outcomes)


def _end(
    tracing: Tracing,
    name: str,
    trace: str,
    began_ns: int,
    attributes: Mapping[str, Attribute],
    failed: bool,
) -> None:
    tracing.record(name, trace, began_ns, attributes, failed=failed, kind=Kind.SERVER)
