"""Reads of the event database: each on one snapshot, on a connection that never writes.

A read sees whole groups only and never blocks the writer. What it reads is in the index or in
the tail, which it takes before its snapshot begins (see `tail.py`). Blocking; one thread at a
time per connection. Raises sqlite3.Error or `ChunkCorrupt` when the file is damaged.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from agent_service.log.packing import unpack
from agent_service.log.port import (
    EventPage,
    FencePage,
    LogSummary,
    OpenRunPage,
    ReadRange,
    ThreadSummary,
)
from agent_service.log.rules import (
    bounded,
    check_fences_of,
    cut_page,
    most_fences,
    most_open_runs,
    most_threads,
    nobody,
    page_after,
    parse_page,
    thread_summary,
)
from agent_service.log.tail import Tail, TailChunk
from steward.model.keys import Epoch, StreamId, UserKey

OPEN_RUNS = (
    "SELECT tenant, user FROM"
    " (SELECT DISTINCT stream FROM record WHERE kind = 2 AND stream > ? ORDER BY stream LIMIT ?)"
    " JOIN stream ON id = stream ORDER BY id"
)
"""Kind 2 is RUN."""

FENCES = "SELECT id, tenant, user, fence FROM stream WHERE id > ? ORDER BY id LIMIT ?"

SUMMARY = "SELECT events, streams, fence, (SELECT count(*) FROM record WHERE kind = 2) FROM meta"


def read_events(
    connection: sqlite3.Connection, tail: Tail, user: UserKey, wanted: ReadRange
) -> EventPage:
    """A page of one user's events."""
    wanted = bounded(wanted)
    newest = tail.of(user)
    with _snapshot(connection):
        stream = connection.execute(
            "SELECT id, stream_id, oldest FROM stream WHERE tenant = ? AND user = ?", user
        ).fetchone()
        if stream is None:
            return EventPage(StreamId(""), (), (), 0, 1, False)
        row, stream_id, oldest = stream
        indexed = connection.execute(
            "SELECT first, chunk FROM chunk_index WHERE stream = ? ORDER BY first DESC LIMIT 1",
            (row,),
        ).fetchone()
        if indexed is not None:
            # They may have been indexed between the two looks.
            newest = tuple(chunk for chunk in newest if chunk.first > indexed[0])
        head = oldest - 1
        if newest or indexed is not None:
            last = newest[-1].id if newest else indexed[1]
            head = connection.execute(
                "SELECT first + count - 1 FROM chunk WHERE id = ?", (last,)
            ).fetchone()[0]
        wanted = replace(wanted, after=max(wanted.after, oldest - 1))
        found = _matching(connection, row, newest, wanted)
        return cut_page(found, wanted, StreamId(stream_id), head, oldest)


def _matching(
    connection: sqlite3.Connection, row: int, newest: tuple[TailChunk, ...], wanted: ReadRange
) -> Iterator[tuple[int, bytes]]:
    parts = [_indexed(connection, row, wanted), _of_tail(connection, newest, wanted)]
    if wanted.newest:
        parts.reverse()
    for part in parts:
        for first, count, packed in part:
            chunk = list(enumerate(unpack(count, packed), first))
            if wanted.newest:
                chunk.reverse()
            for sequence, (payload, conversation) in chunk:
                if not wanted.after < sequence <= wanted.until:
                    continue
                if wanted.conversation and not conversation:
                    continue
                yield sequence, payload


def _indexed(
    connection: sqlite3.Connection, row: int, wanted: ReadRange
) -> Iterator[tuple[int, int, bytes]]:
    # The chunk that holds after + 1 may begin before it.
    sql = (
        "SELECT i.first, count, packed FROM chunk_index AS i CROSS JOIN chunk ON id = i.chunk"
        " WHERE i.stream = :row AND i.first <= :until"
        " AND i.first >= ifnull((SELECT max(first) FROM chunk_index"
        " WHERE stream = :row AND first <= :after + 1), 0)"
    )
    if wanted.thread_id:
        sql += " AND i.thread_id = :thread_id"
    if wanted.conversation:
        sql += " AND i.conversation"
    sql += " ORDER BY i.first DESC" if wanted.newest else " ORDER BY i.first"
    values = {
        "row": row,
        "after": wanted.after,
        "until": wanted.until,
        "thread_id": wanted.thread_id,
    }
    return connection.execute(sql, values)


def _of_tail(
    connection: sqlite3.Connection, newest: tuple[TailChunk, ...], wanted: ReadRange
) -> Iterator[tuple[int, int, bytes]]:
    for chunk in reversed(newest) if wanted.newest else newest:
        if chunk.first > wanted.until or (wanted.conversation and not chunk.conversation):
            continue
        if wanted.thread_id and chunk.thread_id != wanted.thread_id:
            continue
        yield connection.execute(
            "SELECT first, count, packed FROM chunk WHERE id = ?", (chunk.id,)
        ).fetchone()


def read_threads(
    connection: sqlite3.Connection, user: UserKey, limit: int, page: str
) -> tuple[list[ThreadSummary], str]:
    """A page of one user's threads, newest first, and the page after it."""
    limit = most_threads(limit)
    sequence, thread_id = parse_page(page)
    rows = connection.execute(
        "SELECT thread_id, value FROM thread"
        " WHERE stream = (SELECT id FROM stream WHERE tenant = ? AND user = ?)"
        " AND sequence <= ? AND (sequence < ? OR thread_id > ?)"
        " ORDER BY sequence DESC, thread_id LIMIT ?",
        (*user, sequence, sequence, thread_id, limit + 1),
    ).fetchall()
    listed = [thread_summary(key, value) for key, value in rows[:limit]]
    return listed, page_after(listed[-1]) if len(rows) > limit else ""


def read_open_runs(
    connection: sqlite3.Connection, after: UserKey | None, limit: int
) -> OpenRunPage:
    """A page of the users who have an open run, by the index of RUN records alone."""
    limit = most_open_runs(limit)
    with _snapshot(connection):
        rows = connection.execute(OPEN_RUNS, (_row_of(connection, after), limit + 1)).fetchall()
    users = tuple(UserKey(tenant, user) for tenant, user in rows[:limit])
    return OpenRunPage(users, len(rows) > limit)


def _row_of(connection: sqlite3.Connection, after: UserKey | None) -> int:
    """Behind which row a page begins. Raises StewardError for a user who has none."""
    if after is None:
        return 0
    stream = connection.execute(
        "SELECT id FROM stream WHERE tenant = ? AND user = ?", after
    ).fetchone()
    if stream is None:
        raise nobody(after)
    return int(stream[0])


def read_fences_of(connection: sqlite3.Connection, users: Sequence[UserKey]) -> FencePage:
    """The fences of these users, by the key of streams."""
    check_fences_of(users)
    found: list[tuple[UserKey, Epoch]] = []
    with _snapshot(connection):
        for user in dict.fromkeys(users):
            row = connection.execute(
                "SELECT fence FROM stream WHERE tenant = ? AND user = ?", user
            ).fetchone()
            if row is not None:
                found.append((user, Epoch(row[0])))
    return FencePage(tuple(found))


def read_fences(connection: sqlite3.Connection, after: UserKey | None, limit: int) -> FencePage:
    """A page of all fences, in the order of streams."""
    limit = most_fences(limit)
    with _snapshot(connection):
        rows = connection.execute(FENCES, (_row_of(connection, after), limit + 1)).fetchall()
    found = tuple((UserKey(tenant, user), Epoch(fence)) for _, tenant, user, fence in rows[:limit])
    return FencePage(found, len(rows) > limit)


def read_summary(connection: sqlite3.Connection, log_id: str) -> LogSummary:
    """Totals of all streams, which are kept, and open runs, which their index has."""
    events, streams, fence, runs = connection.execute(SUMMARY).fetchone()
    return LogSummary(log_id, streams, events, fence, runs)


@contextmanager
def _snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
