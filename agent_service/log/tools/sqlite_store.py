"""The event log of a data directory, at rest: under its lock, so that no log process runs on it."""

import sqlite3
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from agent_service.core.journal import RecordKind
from agent_service.log.database import DATABASE, DatabaseFile, open_database
from agent_service.log.tools.store import (
    StoredChunk,
    StoredRecord,
    StoredStream,
    StoredThread,
    Totals,
)
from steward.model.keys import UserKey
from steward.runtime.store_tool import StoreProblem

_STREAM = (
    "SELECT s.id, tenant, user, stream_id, fence, activation, oldest,"
    " ifnull(c.first + c.count, oldest),"
    " max(noted, CASE WHEN c.epoch = fence THEN c.number ELSE 0 END)"
    " FROM stream s LEFT JOIN chunk c ON c.id ="
    " (SELECT chunk FROM chunk_index WHERE stream = s.id ORDER BY first DESC LIMIT 1)"
)
_CHUNKS = (
    "SELECT c.id, c.first, count, epoch, number, c.thread_id, c.conversation, packed"
    " FROM chunk_index i CROSS JOIN chunk c ON c.id = i.chunk WHERE i.stream = ? ORDER BY i.first"
)
_COUNTS = {
    "chunks without a stream": (
        "SELECT count(*) FROM chunk WHERE stream NOT IN (SELECT id FROM stream)"
    ),
    "records without a stream": (
        "SELECT count(*) FROM record WHERE stream NOT IN (SELECT id FROM stream)"
    ),
    "threads without a stream": (
        "SELECT count(*) FROM thread WHERE stream NOT IN (SELECT id FROM stream)"
    ),
    "chunks that the index does not have": (
        "SELECT count(*) FROM chunk c LEFT JOIN chunk_index i"
        " ON i.stream = c.stream AND i.first = c.first AND i.chunk = c.id"
        " AND i.thread_id = c.thread_id AND i.conversation = c.conversation WHERE i.chunk IS NULL"
    ),
    "index entries without a chunk": (
        "SELECT count(*) FROM chunk_index i LEFT JOIN chunk c ON c.id = i.chunk WHERE c.id IS NULL"
    ),
    "THREAD records in the wrong table": (
        f"SELECT count(*) FROM record WHERE kind = {RecordKind.THREAD.value}"
    ),
    "fences above the largest one that is noted": (
        "SELECT count(*) FROM stream WHERE fence > (SELECT fence FROM meta)"
    ),
}


class SqliteStore:
    """`Store` over `<data>/events.db`. `make`: whether one that is absent is made."""

    def __init__(self, data: Path, *, make: bool) -> None:
        self.name = f"sqlite:{data}"
        self.log_id = ""
        self._data = data
        self._make = make
        self._file: DatabaseFile | None = None
        # Chunk ids and the wall times at which all below them were written.
        self._below: list[int] = []
        self._at_ms: list[int] = []

    async def open(self) -> None:
        """As in the port. Raises EnvironmentUnusable while another process has it."""
        if not self._make and not (self._data / DATABASE).exists():
            raise StoreProblem(f"{self._data} has no {DATABASE}")
        self._file = open_database(self._data)
        self.log_id = self._file.log_id
        for chunk, at_ms in self._db.execute("SELECT chunk, at_ms FROM clock ORDER BY chunk"):
            self._below.append(chunk)
            self._at_ms.append(at_ms)

    async def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _db(self) -> sqlite3.Connection:
        assert self._file is not None, "opened before"
        return self._file.writer

    async def totals(self) -> Totals:
        return Totals(*self._db.execute("SELECT streams, events FROM meta").fetchone())

    async def streams(self) -> AsyncIterator[StoredStream]:
        after = 0
        while rows := self._db.execute(
            f"{_STREAM} WHERE s.id > ? ORDER BY s.id LIMIT 500", (after,)
        ).fetchall():
            for row in rows:
                yield _stream(row)
            after = rows[-1][0]

    async def stream(self, user: UserKey) -> StoredStream | None:
        found = self._db.execute(f"{_STREAM} WHERE tenant = ? AND user = ?", user).fetchone()
        return _stream(found) if found is not None else None

    async def chunks(self, stream: StoredStream) -> AsyncIterator[StoredChunk]:
        now_ms = time.time_ns() // 1_000_000
        for row in self._db.execute(_CHUNKS, (stream.row,)):
            id_, first, count, epoch, number, thread_id, conversation, packed = row
            at = bisect_right(self._below, id_)
            at_ms = self._at_ms[at] if at < len(self._at_ms) else now_ms
            yield StoredChunk(
                first, count, epoch, number, at_ms * 1000, thread_id, bool(conversation), packed
            )

    async def records(self, stream: StoredStream) -> list[StoredRecord]:
        rows = self._db.execute(
            "SELECT kind, key, value FROM record WHERE stream = ?", (stream.row,)
        )
        return [StoredRecord(*row) for row in rows]

    async def threads(self, stream: StoredStream) -> list[StoredThread]:
        rows = self._db.execute(
            "SELECT thread_id, sequence, value FROM thread WHERE stream = ?", (stream.row,)
        )
        return [StoredThread(*row) for row in rows]

    async def adopt(self, log_id: str) -> None:
        self._db.execute("UPDATE meta SET log_id = ?", (log_id,))
        self.log_id = log_id

    async def write(
        self,
        stream: StoredStream,
        chunks: AsyncIterator[StoredChunk],
        records: Sequence[StoredRecord],
        threads: Sequence[StoredThread],
    ) -> None:
        """As in the port. Ages of events are not copied: they count from now."""
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            row, fewer = self._clear(stream)
            id_ = db.execute("SELECT indexed FROM meta").fetchone()[0]
            events = -fewer
            async for chunk in chunks:
                id_ += 1
                events += chunk.events
                db.execute(
                    "INSERT INTO chunk (id, stream, first, count, epoch, number, thread_id,"
                    " conversation, packed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (id_, row, *chunk[:4], *chunk[5:]),
                )
                db.execute(
                    "INSERT INTO chunk_index VALUES (?, ?, ?, ?, ?)",
                    (row, chunk.first, id_, chunk.thread_id, chunk.conversation),
                )
            db.executemany(
                "INSERT INTO record VALUES (?, ?, ?, ?)", [(row, *record) for record in records]
            )
            db.executemany(
                "INSERT INTO thread VALUES (?, ?, ?, ?)", [(row, *thread) for thread in threads]
            )
            db.execute(
                "UPDATE meta SET events = events + ?, indexed = ?, fence = max(fence, ?)",
                (events, id_, stream.fence),
            )
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise

    def _clear(self, stream: StoredStream) -> tuple[int, int]:
        """The stream's row with nothing in it, and how many events are gone by this."""
        db = self._db
        known = db.execute(
            "SELECT id FROM stream WHERE tenant = ? AND user = ?", stream.user
        ).fetchone()
        values = (stream.stream_id, stream.fence, stream.activation, stream.oldest, stream.number)
        if known is None:
            row = db.execute(
                "INSERT INTO stream (tenant, user, stream_id, fence, activation, oldest, noted)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*stream.user, *values),
            ).lastrowid
            assert row is not None
            db.execute("UPDATE meta SET streams = streams + 1")
            return row, 0
        (row,) = known
        fewer: int = db.execute(
            "SELECT ifnull(sum(count), 0) FROM chunk_index i JOIN chunk c ON c.id = i.chunk"
            " WHERE i.stream = ?",
            (row,),
        ).fetchone()[0]
        db.execute(
            "DELETE FROM chunk WHERE id IN (SELECT chunk FROM chunk_index WHERE stream = ?)", (row,)
        )
        for table in ("chunk_index", "record", "thread"):
            db.execute(f"DELETE FROM {table} WHERE stream = ?", (row,))
        db.execute(
            "UPDATE stream SET stream_id = ?, fence = ?, activation = ?, oldest = ?, noted = ?"
            " WHERE id = ?",
            (*values, row),
        )
        return row, fewer

    async def findings(self) -> list[str]:
        found = [
            f"SQLite finds damage: {text}"
            for (text,) in self._db.execute("PRAGMA integrity_check(20)")
            if text != "ok"
        ]
        if found:
            return found
        for what, sql in _COUNTS.items():
            (number,) = self._db.execute(sql).fetchone()
            if number:
                found.append(f"{number} {what}")
        return found


def _stream(row: tuple[int, str, str, str, int, str, int, int, int]) -> StoredStream:
    id_, tenant, user, *rest = row
    return StoredStream(id_, UserKey(tenant, user), *rest)  # type: ignore[arg-type]
