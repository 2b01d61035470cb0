"""One round of a group: seals and appends of different users, as columns for server functions.

What is decided, is decided by the database under the lock of the user's row
(`migrations.py`); here values become columns and rows become outcomes. A round is one
statement for its seals and one for its appends, each a transaction of its own, and may
be sent again whole when its answer was lost: the log recognises what it has.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import orjson

from agent_service.core.journal import (
    Append,
    AppendOutcome,
    Committed,
    Conflict,
    Fenced,
    Record,
    RecordKind,
    Seal,
    Sealed,
    SealOutcome,
)
from agent_service.log.packing import pack
from agent_service.log.port import Operation
from agent_service.log.rules import thread_sequence
from steward.model.keys import Epoch, StreamId, UserKey
from steward.model.keys import Sequence as SequenceNumber
from steward.postgres.texts import original, stored

SEAL = "SELECT * FROM steward.seal_v1($1, $2, $3, $4, $5, $6)"
APPEND = "SELECT * FROM steward.append_v1(" + ", ".join(f"${n}" for n in range(1, 23)) + ")"

WRITTEN, FENCED, REPEATED, CONFLICT = range(4)
"""The verdicts of `append_v1`."""


def rounds(operations: Sequence[Operation]) -> list[list[int]]:
    """Indexes of the operations, cut so that no round has a user twice; the order is kept."""
    cut: list[list[int]] = [[]]
    users: set[UserKey] = set()
    for index, operation in enumerate(operations):
        if operation.user in users:
            cut.append([])
            users.clear()
        users.add(operation.user)
        cut[-1].append(index)
    return cut


def seal_arguments(seals: Sequence[Seal], stream_ids: Sequence[StreamId]) -> list[Any]:
    """The columns of `seal_v1`, but for the slot. `stream_ids` are for users who have none yet."""
    return [
        [stored(seal.user.tenant) for seal in seals],
        [stored(seal.user.user) for seal in seals],
        [seal.epoch for seal in seals],
        [stored(seal.activation) for seal in seals],
        list(stream_ids),
    ]


def seal_outcomes(number: int, rows: Sequence[Any]) -> list[SealOutcome]:
    """The outcomes of `number` seals from the rows of `seal_v1`."""
    outcomes: list[SealOutcome | None] = [None] * number
    records: defaultdict[int, list[Record]] = defaultdict(list)
    for row in rows:
        if row["kind"] is not None:
            key = original(row["key"])
            records[row["op"]].append(Record(RecordKind(row["kind"]), key, row["value"]))
    for row in rows:
        at = row["op"] - 1
        if not row["sealed"]:
            outcomes[at] = Fenced(Epoch(row["fence"]))
        elif outcomes[at] is None:
            outcomes[at] = Sealed(
                stream_id=StreamId(row["stream_id"]),
                next_sequence=SequenceNumber(row["next"]),
                oldest_sequence=SequenceNumber(row["oldest"]),
                records=tuple(records[row["op"]]),
                last_append_number=row["number"],
            )
    found = [outcome for outcome in outcomes if outcome is not None]
    assert len(found) == number, "every seal has a row"
    return found


class _Columns:
    """Rows that are collected as columns."""

    __slots__ = ("columns",)

    def __init__(self, width: int) -> None:
        self.columns: list[list[Any]] = [[] for _ in range(width)]

    def add(self, *values: object) -> None:
        for column, value in zip(self.columns, values, strict=True):
            column.append(value)


def append_arguments(appends: Sequence[Append]) -> list[Any]:
    """The columns of `append_v1`, but for the slot."""
    asked, chunks, records, threads = _Columns(6), _Columns(6), _Columns(4), _Columns(5)
    for op, append in enumerate(appends, 1):
        user = append.user
        asked.add(
            stored(user.tenant),
            stored(user.user),
            append.epoch,
            append.append_number,
            append.expected_sequence,
            len(append.events),
        )
        start = 0
        for count, thread_id, conversation, packed in pack(append.events) if append.events else ():
            chunks.add(op, start, count, stored(thread_id), conversation, packed)
            start += count
        # Of several of one key the last one counts.
        last = {(record.kind, record.key): record for record in append.records}
        for (kind, key), record in last.items():
            if kind is not RecordKind.THREAD:
                records.add(op, kind.value, stored(key), None if record.deleted else record.value)
            elif record.deleted:
                threads.add(op, stored(key), 0, None, None)
            else:
                titled = _first_titled(append.records, key)
                sequence = thread_sequence(record.value)
                threads.add(op, stored(key), sequence, titled, record.value)
    return [*asked.columns, *chunks.columns, *records.columns, *threads.columns]


def _first_titled(records: Sequence[Record], key: str) -> bytes | None:
    """The first value in this append that gives the thread a title, since it was deleted last."""
    titled: bytes | None = None
    for record in records:
        if record.kind is RecordKind.THREAD and record.key == key:
            if record.deleted:
                titled = None
            elif titled is None and orjson.loads(record.value).get("title"):
                titled = record.value
    return titled


def append_outcomes(rows: Sequence[Any]) -> tuple[list[AppendOutcome], list[int]]:
    """Outcomes of appends from the rows of `append_v1`, one each, and their verdicts."""
    outcomes: list[AppendOutcome] = []
    verdicts: list[int] = []
    for verdict, value in rows:
        verdicts.append(verdict)
        if verdict == FENCED:
            outcomes.append(Fenced(Epoch(value)))
        elif verdict == CONFLICT:
            outcomes.append(Conflict(SequenceNumber(value)))
        else:
            outcomes.append(Committed(SequenceNumber(value)))
    return outcomes, verdicts
