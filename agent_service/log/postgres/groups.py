"""One round of a group: seals and appends of different users, as columns for server functions.

What is decided, is decided by the database under the lock of the user's row
(`migrations.py`, `appending.py`); here values become columns and rows become outcomes. A round
is one statement for its seals and one for its appends, each a transaction of its own, and
may be sent again whole when its answer was lost: the log recognises what it has.
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
from agent_service.log.packing import Chunk, pack
from agent_service.log.port import Operation
from agent_service.log.rules import thread_sequence
from steward.model.keys import Epoch, StreamId, UserKey
from steward.model.keys import Sequence as SequenceNumber
from steward.postgres.texts import original, stored

SEAL = "SELECT * FROM steward.seal_v1($1, $2, $3, $4, $5, $6)"
APPEND = "SELECT * FROM steward.append_v2(" + ", ".join(f"${n}" for n in range(1, 27)) + ")"

WRITTEN, FENCED, REPEATED, CONFLICT = range(4)
"""What became of an append; `append_v2` has a row for each that it did not write."""

_NO_CHUNKS = [Chunk(0, "", False, b"")]


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


def in_order(appends: list[tuple[int, Append]]) -> None:
    """Sort numbered appends as the database takes their users: by their stored names' characters.

    Whoever else writes to several of them at once does it in this order too, so that two groups
    never wait for each other.
    """
    appends.sort(key=_stored_user)


def _stored_user(numbered: tuple[int, Append]) -> tuple[str, str]:
    tenant, user = numbered[1].user
    return stored(tenant), stored(user)


def append_arguments(appends: Sequence[Append]) -> list[Any]:
    """The columns of `append_v2`, but for the slot. `appends` are `in_order`."""
    chunks = [pack(append.events) if append.events else _NO_CHUNKS for append in appends]
    # The first chunk of each append, which nearly always is the only one, travels with it.
    columns: list[list[Any]] = [
        [stored(append.user.tenant) for append in appends],
        [stored(append.user.user) for append in appends],
        [append.epoch for append in appends],
        [append.append_number for append in appends],
        [append.expected_sequence for append in appends],
        [len(append.events) for append in appends],
        [of[0].number for of in chunks],
        [stored(of[0].thread_id) for of in chunks],
        [of[0].conversation for of in chunks],
        [of[0].packed for of in chunks],
    ]
    further, records, threads = _Columns(6), _Columns(4), _Columns(5)
    for op, (append, of) in enumerate(zip(appends, chunks, strict=True), 1):
        if len(of) > 1:
            _add_chunks(further, op, of)
        if append.records:
            _add_records(records, threads, op, append.records)
    return [*columns, *further.columns, *records.columns, *threads.columns]


def _add_chunks(further: _Columns, op: int, chunks: Sequence[Chunk]) -> None:
    start = chunks[0].number
    for count, thread_id, conversation, packed in chunks[1:]:
        further.add(op, start, count, stored(thread_id), conversation, packed)
        start += count


def _add_records(records: _Columns, threads: _Columns, op: int, changes: Sequence[Record]) -> None:
    # Of several of one key the last one counts.
    last = {(record.kind, record.key): record for record in changes}
    for (kind, key), record in last.items():
        if kind is not RecordKind.THREAD:
            records.add(op, kind.value, stored(key), None if record.deleted else record.value)
        elif record.deleted:
            threads.add(op, stored(key), 0, None, None)
        else:
            titled = _first_titled(changes, key)
            threads.add(op, stored(key), thread_sequence(record.value), titled, record.value)


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


def append_outcomes(
    appends: Sequence[Append], rows: Sequence[Any]
) -> tuple[list[AppendOutcome], list[int]]:
    """Outcomes and verdicts of appends, from the rows of `append_v2` for those not written."""
    outcomes: list[AppendOutcome] = [
        Committed(SequenceNumber(append.expected_sequence + len(append.events)))
        for append in appends
    ]
    verdicts = [WRITTEN] * len(appends)
    for op, verdict, value in rows:
        verdicts[op - 1] = verdict
        if verdict == FENCED:
            outcomes[op - 1] = Fenced(Epoch(value))
        elif verdict == CONFLICT:
            outcomes[op - 1] = Conflict(SequenceNumber(value))
        else:
            outcomes[op - 1] = Committed(SequenceNumber(value))
    return outcomes, verdicts
