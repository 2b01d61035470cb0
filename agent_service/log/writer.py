"""The one writer of the event database: a group of seals and appends in one transaction.

What is decided here is what `LogState` decides, over rows. Heads and fences of the
users seen last are kept in memory, which is sound because no other process may open
the file. A refusal is that operation's outcome and the rest of the group commits; an
exception means that nothing of the group may be taken for written, and that this
writer must not be used again (its memory is ahead of the file).

Rows go in by few, wide statements: each `sqlite3` step gives up the interpreter's lock,
and one per row would let a busy event loop stretch a commit a hundredfold.
"""

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
from agent_service.log import packing
from agent_service.log.rules import thread_sequence, with_first_title
from steward.model.keys import Epoch, StreamId, UserKey
from steward.model.keys import Sequence as SequenceNumber

Operation = Seal | Append
Outcome = SealOutcome | AppendOutcome

MOST_HEADS = 100_000
"""Users whose head and fence are kept in memory (some 300 bytes each)."""

_WIDEST = 256


class Group(NamedTuple):
    """A durable group: outcomes in order, events written, appends that were repeats."""

    outcomes: list[Outcome]
    events: int
    repeated: int


@dataclass(slots=True)
class _Head:
    """What the log compares: one user's fence, next sequence and last append."""

    row: int
    stream_id: StreamId
    fence: int
    activation: str
    oldest: int
    next: int
    number: int


class _WideStatement:
    """A statement for many rows, run in powers of two so that few are prepared."""

    __slots__ = ("_before", "_behind", "_row", "_width", "values")

    def __init__(self, before: str, width: int, behind: str = "") -> None:
        self._before = before
        self._behind = behind
        self._width = width
        self._row = "(" + ",".join("?" * width) + ")"
        self.values: list[object] = []

    def run(self, connection: sqlite3.Connection) -> None:
        at = 0
        left = len(self.values) // self._width
        while left:
            rows = min(_WIDEST, 1 << (left.bit_length() - 1))
            sql = self._before + ",".join([self._row] * rows) + self._behind
            end = at + rows * self._width
            connection.execute(sql, self.values[at:end])
            at = end
            left -= rows
        self.values.clear()


class GroupWriter:
    """Commits groups. Blocking; one thread at a time."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        make_stream_id: Callable[[], StreamId],
        most_heads: int = MOST_HEADS,
    ) -> None:
        self._db = connection
        self._make_stream_id = make_stream_id
        self._most_heads = most_heads
        self._heads: dict[UserKey, _Head] = {}
        self._events = 0
        self._repeated = 0
        # Last write of a key in this group wins; None deletes.
        self._records: dict[tuple[int, int, str], bytes | None] = {}
        self._noted: dict[int, int] = {}
        self._chunk_rows = _WideStatement(
            "INSERT INTO chunk (stream, first, count, epoch, number, thread_id, conversation,"
            " packed) VALUES ",
            8,
        )
        self._record_rows = _WideStatement("REPLACE INTO record VALUES ", 4)
        self._record_drops = _WideStatement(
            "DELETE FROM record WHERE (stream, kind, key) IN (VALUES ", 3, ")"
        )
        self._thread_rows = _WideStatement("REPLACE INTO thread VALUES ", 4)
        self._thread_drops = _WideStatement(
            "DELETE FROM thread WHERE (stream, thread_id) IN (VALUES ", 2, ")"
        )

    def commit(self, operations: Sequence[Operation]) -> Group:
        """Apply the operations in order, make them durable, and return their outcomes in order.

        Raises sqlite3.Error when the database failed; then the writer is done for.
        """
        self._db.execute("BEGIN IMMEDIATE")
        self._events = 0
        self._repeated = 0
        outcomes: list[Outcome] = [
            self._append(operation) if isinstance(operation, Append) else self._seal(operation)
            for operation in operations
        ]
        self._flush()
        if self._events:
            self._db.execute("UPDATE meta SET events = events + ?", (self._events,))
        self._db.execute("COMMIT")
        while len(self._heads) > self._most_heads:
            del self._heads[next(iter(self._heads))]
        return Group(outcomes, self._events, self._repeated)

    def _append(self, append: Append) -> AppendOutcome:
        head = self._head(append.user)
        if head is None:
            return Fenced(Epoch(0))
        if append.epoch != head.fence:
            return Fenced(Epoch(head.fence))
        if append.append_number == head.number:
            self._repeated += 1
            return Committed(SequenceNumber(head.next))
        if append.append_number != head.number + 1 or append.expected_sequence != head.next:
            return Conflict(SequenceNumber(head.next))
        head.number = append.append_number
        if append.events:
            for count, thread_id, conversation, packed in packing.pack(append.events):
                self._chunk_rows.values += (
                    head.row,
                    head.next,
                    count,
                    append.epoch,
                    append.append_number,
                    thread_id,
                    conversation,
                    packed,
                )
                head.next += count
            self._events += len(append.events)
        else:
            self._noted[head.row] = append.append_number
        for record in append.records:
            value = None if record.deleted else record.value
            if value is not None and record.kind is RecordKind.THREAD:
                value = with_first_title(self._thread(head.row, record.key), value)
            self._records[head.row, record.kind.value, record.key] = value
        return Committed(SequenceNumber(head.next))

    def _thread(self, row: int, thread_id: str) -> bytes | None:
        """The THREAD record as it is now: of this group, or of the file."""
        key = (row, RecordKind.THREAD.value, thread_id)
        if key in self._records:
            return self._records[key]
        found = self._db.execute(
            "SELECT value FROM thread WHERE stream = ? AND thread_id = ?", (row, thread_id)
        ).fetchone()
        return found[0] if found else None

    def _seal(self, seal: Seal) -> SealOutcome:
        head = self._head(seal.user)
        if head is None:
            head = self._create(seal)
        elif seal.epoch > head.fence:
            # What the old activation noted in this group must not outlive its fence.
            self._flush()
            self._db.execute(
                "UPDATE stream SET fence = ?, activation = ?, noted = 0 WHERE id = ?",
                (seal.epoch, seal.activation, head.row),
            )
            head.fence = seal.epoch
            head.activation = seal.activation
            head.number = 0
        elif seal.epoch < head.fence or seal.activation != head.activation:
            return Fenced(Epoch(head.fence))
        if self._records:
            self._flush()
        rows = self._db.execute(
            "SELECT kind, key, value FROM record WHERE stream = ? ORDER BY kind, key", (head.row,)
        ).fetchall()
        return Sealed(
            stream_id=head.stream_id,
            next_sequence=SequenceNumber(head.next),
            oldest_sequence=SequenceNumber(head.oldest),
            records=tuple(Record(RecordKind(kind), key, value) for kind, key, value in rows),
            last_append_number=head.number,
        )

    def _create(self, seal: Seal) -> _Head:
        stream_id = self._make_stream_id()
        row = self._db.execute(
            "INSERT INTO stream (tenant, user, stream_id, fence, activation, oldest, noted)"
            " VALUES (?, ?, ?, ?, ?, 1, 0)",
            (*seal.user, stream_id, seal.epoch, seal.activation),
        ).lastrowid
        assert row is not None
        head = _Head(row, stream_id, seal.epoch, seal.activation, oldest=1, next=1, number=0)
        self._heads[seal.user] = head
        return head

    def _head(self, user: UserKey) -> _Head | None:
        """The head of a user, from memory or the file; it becomes the one used last."""
        head = self._heads.pop(user, None)
        if head is None:
            head = self._load(user)
        if head is not None:
            self._heads[user] = head
        return head

    def _load(self, user: UserKey) -> _Head | None:
        stream = self._db.execute(
            "SELECT id, stream_id, fence, activation, oldest, noted FROM stream"
            " WHERE tenant = ? AND user = ?",
            user,
        ).fetchone()
        if stream is None:
            return None
        row, stream_id, fence, activation, oldest, noted = stream
        last = self._db.execute(
            "SELECT first + count, epoch, number FROM chunk WHERE stream = ?"
            " ORDER BY first DESC LIMIT 1",
            (row,),
        ).fetchone()
        following, epoch, number = last if last is not None else (oldest, 0, 0)
        number = max(noted, number if epoch == fence else 0)
        return _Head(row, StreamId(stream_id), fence, activation, oldest, following, number)

    def _flush(self) -> None:
        """Put into the transaction what was collected so far."""
        self._chunk_rows.run(self._db)
        if self._noted:
            self._db.executemany(
                "UPDATE stream SET noted = ? WHERE id = ?",
                [(number, row) for row, number in self._noted.items()],
            )
            self._noted.clear()
        for (row, kind, key), value in self._records.items():
            if kind == RecordKind.THREAD:
                if value is None:
                    self._thread_drops.values += (row, key)
                else:
                    self._thread_rows.values += (row, key, thread_sequence(value), value)
            elif value is None:
                self._record_drops.values += (row, kind, key)
            else:
                self._record_rows.values += (row, kind, key, value)
        self._records.clear()
        self._record_drops.run(self._db)
        self._record_rows.run(self._db)
        self._thread_drops.run(self._db)
        self._thread_rows.run(self._db)
