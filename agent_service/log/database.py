"""The event database of one machine: its lock, its tables, its connections.

`<data>/events.db` is opened by one process only, which holds `<data>/events.lock`; the
kernel lets go of it when the process dies, however it dies. Two connections are never
in a write transaction at once, and readers hold theirs for one page, so SQLITE_BUSY
can't happen.

`chunk` is a table in order of arrival, since that is what appends are cheap on (a table in
the order of streams is three times slower). `chunk_index` finds a stream's chunks in it, and
covers thread and conversation: a thread is read by walking index entries alone. It is
behind by the newest chunks, which `tail.py` has; those that a process did not get to
index when it ended are indexed at the next start, of which they make out a tenth of a second.

A file of an earlier version is brought to this one at the start, in one transaction.
"""

import fcntl
import os
import secrets
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from agent_service.log.tail import Tail
from steward.runtime.service import EnvironmentUnusable

DATABASE = "events.db"
LOCK = "events.lock"

_APPLICATION_ID = 0x53_54_57_4C
_VERSION = 2

_CHUNK_INDEX = """
CREATE TABLE chunk_index (
    stream INTEGER NOT NULL,
    first INTEGER NOT NULL,
    chunk INTEGER NOT NULL,
    thread_id TEXT NOT NULL,
    conversation INTEGER NOT NULL,
    PRIMARY KEY (stream, first)
) WITHOUT ROWID;
"""
_INDEX_THE_REST = """
INSERT INTO chunk_index
SELECT stream, first, id, thread_id, conversation FROM chunk
WHERE id > (SELECT indexed FROM meta) ORDER BY stream, first
ON CONFLICT (stream, first) DO NOTHING;
UPDATE meta SET indexed = (SELECT ifnull(max(id), 0) FROM chunk);
"""

# Chunks have no time of their own. Those below `chunk` were written by `at_ms`.
_CLOCK = """
CREATE TABLE clock (chunk INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL);
"""

_SCHEMA = (
    """
CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    log_id TEXT NOT NULL,
    -- Totals, and the largest fence: to count them would take as long as there are streams.
    events INTEGER NOT NULL DEFAULT 0,
    streams INTEGER NOT NULL DEFAULT 0,
    fence INTEGER NOT NULL DEFAULT 0,
    -- Chunks up to this id are in the index; of the later ones, some.
    indexed INTEGER NOT NULL DEFAULT 0
);
"""
    + _CLOCK
    + """
CREATE TABLE stream (
    id INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,
    stream_id TEXT NOT NULL,
    fence INTEGER NOT NULL,
    activation TEXT NOT NULL,
    oldest INTEGER NOT NULL,
    -- Number of the last append without events; the others are noted in their chunks.
    noted INTEGER NOT NULL,
    UNIQUE (tenant, user)
);
CREATE TABLE chunk (
    id INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL,
    first INTEGER NOT NULL,
    count INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    number INTEGER NOT NULL,
    thread_id TEXT NOT NULL,
    conversation INTEGER NOT NULL,
    packed BLOB NOT NULL
);
"""
    + _CHUNK_INDEX
    + """
CREATE TABLE record (
    stream INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    key TEXT NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (stream, kind, key)
) WITHOUT ROWID;
-- kind 2 is RUN: the users whose runs a new manager has to end or continue.
CREATE INDEX open_run ON record (stream) WHERE kind = 2;
CREATE TABLE thread (
    stream INTEGER NOT NULL,
    thread_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (stream, thread_id)
) WITHOUT ROWID;
CREATE INDEX thread_newest ON thread (stream, sequence DESC, thread_id);
"""
)

# Version 1 kept an entry of each chunk and each fence by SQLite's own indexes, with every write.
_FROM_1 = f"""
ALTER TABLE meta ADD COLUMN streams INTEGER NOT NULL DEFAULT 0;
ALTER TABLE meta ADD COLUMN fence INTEGER NOT NULL DEFAULT 0;
ALTER TABLE meta ADD COLUMN indexed INTEGER NOT NULL DEFAULT 0;
UPDATE meta SET streams = (SELECT count(*) FROM stream),
    fence = (SELECT ifnull(max(fence), 0) FROM stream);
{_CHUNK_INDEX}
{_CLOCK}
INSERT INTO clock SELECT ifnull(max(id), 0) + 1, strftime('%s', 'now') * 1000 + 1000 FROM chunk;
{_INDEX_THE_REST}
DROP INDEX chunk_of_stream;
DROP INDEX stream_by_fence;
"""


@dataclass(frozen=True, slots=True)
class DatabaseFile:
    """The opened event database. `writer` is for one thread at a time.

    `tail` has the chunks that this process did not index yet.
    """

    path: Path
    log_id: str
    writer: sqlite3.Connection
    tail: Tail
    lock: int

    def reader(self) -> sqlite3.Connection:
        """A new read-only connection, for one thread at a time; close it before `close`."""
        uri = f"{self.path.absolute().as_uri()}?mode=ro"
        return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)

    def close(self) -> None:
        """Fold the write-ahead log into the file and let go of the lock."""
        self.writer.close()
        os.close(self.lock)


def open_database(data: Path) -> DatabaseFile:
    """Open `<data>/events.db`, made when absent, under the exclusive lock.

    Raises EnvironmentUnusable when another process has it, when the directory can't be
    written, or when the file is none of ours.
    """
    path = data / DATABASE
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EnvironmentUnusable(f"{data}: {error.strerror}; make it writable") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentUnusable(
                f"{path} is open in another process; only one may hold the event log"
            ) from None
        try:
            # SQLite gives its helper files the mode of this one.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            writer = _connect(path)
        except OSError as error:
            raise EnvironmentUnusable(f"{path}: {error.strerror}; make it writable") from None
        except sqlite3.Error as error:
            raise EnvironmentUnusable(f"{path} can't be opened as an event log: {error}") from None
    except EnvironmentUnusable:
        os.close(lock)
        raise
    log_id, last_chunk = writer.execute("SELECT log_id, indexed FROM meta").fetchone()
    return DatabaseFile(path, log_id, writer, Tail(last_chunk), lock)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        # Overwriting freed space is for an erase to ask for; each append would pay for it here.
        connection.execute("PRAGMA secure_delete = OFF")
        connection.execute("PRAGMA cache_size = -65536")
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application == 0 and version == 0:
            _create(connection)
        elif application == _APPLICATION_ID and version == 1:
            _change(connection, _FROM_1)
        elif application != _APPLICATION_ID or version != _VERSION:
            raise EnvironmentUnusable(
                f"{path} holds version {version} of another layout; this program reads {_VERSION}"
            )
        _index_the_rest(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _create(connection: sqlite3.Connection) -> None:
    _change(
        connection,
        f"""
        PRAGMA application_id = {_APPLICATION_ID};
        {_SCHEMA}
        INSERT INTO meta (id, log_id) VALUES (1, '{secrets.token_hex(8)}');
        """,
    )


def _change(connection: sqlite3.Connection, script: str) -> None:
    """Run a script that makes the layout that of this version, all of it or nothing."""
    connection.executescript(f"BEGIN EXCLUSIVE; {script} PRAGMA user_version = {_VERSION}; COMMIT;")


def _index_the_rest(connection: sqlite3.Connection) -> None:
    behind = "SELECT (SELECT indexed FROM meta) < (SELECT ifnull(max(id), 0) FROM chunk)"
    if connection.execute(behind).fetchone()[0]:
        connection.executescript(f"BEGIN IMMEDIATE; {_INDEX_THE_REST} COMMIT;")
