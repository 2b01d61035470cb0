"""Outcomes on their way back to a node, in as few messages as their size allows.

Guarantees: no message is larger than `MOST_ANSWER_BYTES` and one record. Whatever one user has
stored must not be too much for the stream that carries all users of a node: it would break, and
break again each time the node asks anew. So the answer to a seal goes in parts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from agent_service.core.journal import AppendOutcome, Record, Sealed, SealOutcome
from agent_service.log.convert import fill_append_answer, fill_seal_answer
from agent_service.log.port import Outcome
from steward.v1 import log_service_pb2

MOST_ANSWER_BYTES = 4 * 1024 * 1024
RECORD_BYTES = 32
"""More than what a record costs on the wire beside its key and value."""


class Answered:
    """The outcomes of one message's operations: seals first, then appends."""

    __slots__ = ("appends", "outcomes", "seals")

    def __init__(
        self, seals: Sequence[int], appends: Sequence[int], outcomes: Sequence[Outcome]
    ) -> None:
        self.seals = seals
        self.appends = appends
        self.outcomes = outcomes


def responses(answered: list[Answered]) -> list[log_service_pb2.HoldLogStreamResponse]:
    """As few messages as their size allows: a seal carries all records of a user, in parts."""
    response = log_service_pb2.HoldLogStreamResponse()
    responses = [response]
    size = 0
    for item in answered:
        outcomes = iter(item.outcomes)
        for request_id in item.seals:
            parts = _parts(cast(SealOutcome, next(outcomes)))
            for number, (part, bulk) in enumerate(parts, 1):
                if size and size + bulk > MOST_ANSWER_BYTES:
                    response = log_service_pb2.HoldLogStreamResponse()
                    responses.append(response)
                    size = 0
                size += bulk
                answer = response.answers.seals.add()
                fill_seal_answer(answer, request_id, part, more=number < len(parts))
        add = response.answers.appends.add
        for request_id in item.appends:
            fill_append_answer(add(), request_id, cast(AppendOutcome, next(outcomes)))
    return responses


def _parts(outcome: SealOutcome) -> list[tuple[SealOutcome, int]]:
    """The outcome in pieces that fit a message each, with their bytes."""
    if not isinstance(outcome, Sealed):
        return [(outcome, 0)]
    parts: list[tuple[list[Record], int]] = []
    records: list[Record] = []
    size = 0
    for record in outcome.records:
        bulk = len(record.key) + len(record.value) + RECORD_BYTES
        if records and size + bulk > MOST_ANSWER_BYTES:
            parts.append((records, size))
            records, size = [], 0
        records.append(record)
        size += bulk
    parts.append((records, size))
    return [(replace(outcome, records=tuple(records)), size) for records, size in parts]
