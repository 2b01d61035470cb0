"""Reads of the event database: each on one snapshot, on a connection that never writes.

A read sees whole groups only and never blocks the writer. Blocking; one thread at a
time per connection. Raises sqlite3.Error or `ChunkCorrupt` when the file is damaged.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from agent_service.log.packing import unpack
from agent_service.log.port import (
    EventPage,
    LogSummary,
    OpenRunPage,
    ReadRange,
    ThreadSummary,
)
from agent_service.log.rules import (
    bounded,
    cut_page,
    most_open_runs,
    most_threads,
    nobody,
    page_after,
    parse_page,
    thread_summary,
)
from steward.model.keys import StreamId, UserKey

OPEN_RUNS = (
    "SELECT tenant, user FROM"
    " (SELECT DISTINCT stream FROM record WHERE kind = 2 AND stream > ? ORDER BY stream LIMIT ?)"
    " JOIN stream ON id = stream ORDER BY id"
)
"""Kind 2 is RUN."""


def read_events(connection: sqlite3.Connection, user: UserKey, wanted: ReadRange) -> EventPage:
    """A page of one user's events."""
    wanted = bounded(wanted)
    with _snapshot(connection):
        stream = connection.execute(
            "SELECT id, stream_id, oldest FROM stream WHERE tenant = ? AND user = ?", user
        ).fetchone()
        if stream is None:
            return EventPage(StreamId(""), (), (), 0, 1, False)
        row, stream_id, oldest = stream
        last = connection.execute(
            "SELECT first + count - 1 FROM chunk WHERE stream = ? ORDER BY first DESC LIMIT 1",
            (row,),
        ).fetchone()
        head = last[0] if last is not None else oldest - 1
        found = _matching(connection, row, wanted)
        return cut_page(found, wanted, StreamId(stream_id), head, oldest)


def _matching(
    connection: sqlite3.Connection, row: int, wanted: ReadRange
) -> Iterator[tuple[int, bytes]]:
    # The chunk that holds after + 1 may begin before it.
    sql = (
        "SELECT first, count, packed FROM chunk WHERE stream = :row AND first <= :until"
        " AND first >= ifnull((SELECT max(first) FROM chunk"
        " WHERE stream = :row AND first <= :after + 1), 0)"
    )
    if wanted.thread_id:
        sql += " AND thread_id = :thread_id"
    if wanted.conversation:
        sql += " AND conversation"
    sql += " ORDER BY first DESC" if wanted.newest else " ORDER BY first"
    values = {
        "row": row,
        "after": wanted.after,
        "until": wanted.until,
        "thread_id": wanted.thread_id,
    }
    for first, count, packed in connection.execute(sql, values):
        chunk = list(enumerate(unpack(count, packed), first))
        if wanted.newest:
            chunk.reverse()
        for sequence, (payload, conversation) in chunk:
            if not wanted.after < sequence <= wanted.until:
                continue
            if wanted.conversation and not conversation:
                continue
            yield sequence, payload


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
    row = 0
    with _snapshot(connection):
        if after is not None:
            stream = connection.execute(
                "SELECT id FROM stream WHERE tenant = ? AND user = ?", after
            ).fetchone()
            if stream is None:
                raise nobody(after)
            row = stream[0]
        rows = connection.execute(OPEN_RUNS, (row, limit + 1)).fetchall()
    users = tuple(UserKey(tenant, user) for tenant, user in rows[:limit])
    return OpenRunPage(users, len(rows) > limit)


def read_summary(connection: sqlite3.Connection, log_id: str) -> LogSummary:
    """Totals of all streams, from indexes."""
    with _snapshot(connection):
        events, streams, fence, runs = connection.execute(
            "SELECT (SELECT events FROM meta), (SELECT count(*) FROM stream),"
            " (SELECT ifnull(max(fence), 0) FROM stream),"
            " (SELECT count(*) FROM record WHERE kind = 2)"
        ).fetchone()
    return LogSummary(log_id, streams, events, fence, runs)


@contextmanager
def _snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
