"""The one writer of the event database: a group of seals and appends in one transaction.

What is decided here is what `LogState` decides, over rows. Heads and fences of the
users seen last are kept in memory, which is sound because no other process may open
the file. A refusal is that operation's outcome and the rest of the group commits; an
exception means that nothing of the group may be taken for written, and that this
writer must not be used again (its memory is ahead of the file).
"""

import sqlite3
import time
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
from agent_service.log.compacting import CLOCK_MS, CompactionStep, Compactor
from agent_service.log.port import Compaction, Operation, Outcome
from agent_service.log.rules import thread_sequence, with_first_title
from agent_service.log.tail import Tail
from agent_service.log.wide import WideStatement
from steward.model.keys import Epoch, StreamId, UserKey
from steward.model.keys import Sequence as SequenceNumber

MOST_HEADS = 100_000
"""Users whose head and fence are kept in memory (some 300 bytes each)."""

_LAST_INDEXED = "SELECT chunk FROM chunk_index WHERE stream = ? ORDER BY first DESC LIMIT 1"


class Group(NamedTuple):
    """A durable group: outcomes in order, events written, appends that were repeats."""

    outcomes: list[Outcome]
    events: int
    repeated: int
    compaction: Compaction | None = None


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


class GroupWriter:
    """Commits groups. Blocking; one thread at a time."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        tail: Tail,
        make_stream_id: Callable[[], StreamId],
        most_heads: int = MOST_HEADS,
        clock_ms: int = CLOCK_MS,
    ) -> None:
        """`connection` and `tail` are those of one opened database.

        `clock_ms`: how exactly the ages of events are known, at best.
        """
        self._db = connection
        self._tail = tail
        self._make_stream_id = make_stream_id
        self._most_heads = most_heads
        self._heads: dict[UserKey, _Head] = {}
        self._compactor = Compactor(connection, tail, clock_ms)
        self._events = 0
        self._streams = 0
        self._fence = 0
        self._repeated = 0
        # Last write of a key in this group wins; None deletes.
        self._records: dict[tuple[int, int, str], bytes | None] = {}
        self._noted: dict[int, int] = {}
        self._chunk_rows = WideStatement(
            "INSERT INTO chunk (id, stream, first, count, epoch, number, thread_id, conversation,"
            " packed) VALUES ",
            9,
        )
        self._index_rows = WideStatement(
            "INSERT INTO chunk_index (stream, first, chunk, thread_id, conversation) VALUES ", 5
        )
        self._record_rows = WideStatement("REPLACE INTO record VALUES ", 4)
        self._record_drops = WideStatement(
            "DELETE FROM record WHERE (stream, kind, key) IN (VALUES ", 3, ")"
        )
        self._thread_rows = WideStatement("REPLACE INTO thread VALUES ", 4)
        self._thread_drops = WideStatement(
            "DELETE FROM thread WHERE (stream, thread_id) IN (VALUES ", 2, ")"
        )

    def commit(self, operations: Sequence[Operation], step: CompactionStep | None = None) -> Group:
        """Apply the operations in order, make them durable, and return their outcomes in order.

        `step` is done after them. Raises sqlite3.Error when the database failed; then the writer is
        done for.
        """
        self._db.execute("BEGIN IMMEDIATE")
        self._events = self._streams = self._fence = self._repeated = 0
        outcomes: list[Outcome] = [
            self._append(operation) if isinstance(operation, Append) else self._seal(operation)
            for operation in operations
        ]
        self._flush()
        self._compactor.note_time(time.time_ns() // 1_000_000)
        if step is not None:
            self._compactor.find(step)
        self._index()
        compaction = self._compact() if step is not None else None
        self._count(compaction.removed if compaction is not None else 0)
        self._db.execute("COMMIT")
        self._tail.committed()
        while len(self._heads) > self._most_heads:
            del self._heads[next(iter(self._heads))]
        return Group(outcomes, self._events, self._repeated, compaction)

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
                    self._tail.add(append.user, head.row, head.next, thread_id, conversation),
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
            self._fence = max(self._fence, seal.epoch)
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
        self._streams += 1
        self._fence = max(self._fence, seal.epoch)
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
        tail = self._tail.of(user)
        newest = (tail[-1].id,) if tail else self._db.execute(_LAST_INDEXED, (row,)).fetchone()
        last = self._db.execute(
            "SELECT first + count, epoch, number FROM chunk WHERE id = ?", newest or (0,)
        ).fetchone()
        following, epoch, number = last if last is not None else (oldest, 0, 0)
        number = max(noted, number if epoch == fence else 0)
        return _Head(row, StreamId(stream_id), fence, activation, oldest, following, number)

    def _index(self) -> None:
        """Index the chunks that do not stay in the tail."""
        for chunk in self._tail.leave():
            self._index_rows.values += (
                chunk.stream,
                chunk.first,
                chunk.id,
                chunk.thread_id,
                chunk.conversation,
            )
        self._index_rows.run(self._db)

    def _compact(self) -> Compaction:
        """Remove what the compactor found, also from what is known of its users."""
        compaction, begins = self._compactor.remove()
        for user, oldest in begins:
            head = self._heads.get(user)
            if head is not None:
                head.oldest = oldest
        return compaction

    def _count(self, removed: int) -> None:
        """Bring the totals up to what is written and removed. After `_index`."""
        if self._events or self._streams or self._fence or removed:
            self._db.execute(
                "UPDATE meta SET events = events + ?, streams = streams + ?,"
                " fence = max(fence, ?), indexed = ?",
                (self._events - removed, self._streams, self._fence, self._tail.indexed()),
            )

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
