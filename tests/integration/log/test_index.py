"""The index of chunks, which is behind by the newest: nothing is missed, whenever it is read."""

import sqlite3
import threading
from pathlib import Path

import pytest

from agent_service.core.journal import Append, Committed, Seal, Sealed, StoredEvent
from agent_service.log.database import DatabaseFile, open_database
from agent_service.log.port import LogSummary, ReadRange
from agent_service.log.reader import read_events, read_summary
from agent_service.log.tail import Tail
from agent_service.log.writer import GroupWriter
from steward.model.keys import Epoch, Sequence, StreamId, UserKey
from steward.runtime.service import EnvironmentUnusable

USERS = [UserKey("default", f"user-{n}") for n in range(5)]
ALL = ReadRange(limit=1000)

VERSION_1 = """
PRAGMA application_id = 0x5354574C;
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1), log_id TEXT NOT NULL, events INTEGER NOT NULL
);
CREATE TABLE stream (
    id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, user TEXT NOT NULL, stream_id TEXT NOT NULL,
    fence INTEGER NOT NULL, activation TEXT NOT NULL, oldest INTEGER NOT NULL,
    noted INTEGER NOT NULL, UNIQUE (tenant, user)
);
CREATE INDEX stream_by_fence ON stream (fence);
CREATE TABLE chunk (
    id INTEGER PRIMARY KEY, stream INTEGER NOT NULL, first INTEGER NOT NULL,
    count INTEGER NOT NULL, epoch INTEGER NOT NULL, number INTEGER NOT NULL,
    thread_id TEXT NOT NULL, conversation INTEGER NOT NULL, packed BLOB NOT NULL
);
CREATE INDEX chunk_of_stream ON chunk (stream, first, thread_id, conversation);
CREATE TABLE record (
    stream INTEGER NOT NULL, kind INTEGER NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (stream, kind, key)
) WITHOUT ROWID;
CREATE INDEX open_run ON record (stream) WHERE kind = 2;
CREATE TABLE thread (
    stream INTEGER NOT NULL, thread_id TEXT NOT NULL, sequence INTEGER NOT NULL,
    value BLOB NOT NULL, PRIMARY KEY (stream, thread_id)
) WITHOUT ROWID;
CREATE INDEX thread_newest ON thread (stream, sequence DESC, thread_id);
INSERT INTO meta VALUES (1, 'the-log', 3);
INSERT INTO stream VALUES (1, 'default', 'user-0', 's-1', 4, 'a', 1, 0);
INSERT INTO chunk VALUES (1, 1, 1, 1, 4, 1, 'main', 0, x'0600000031');
INSERT INTO chunk VALUES (2, 1, 2, 2, 4, 2, 'main', 1, x'02000000320300000033');
"""


def payloads(file: DatabaseFile, tail: Tail, user: UserKey) -> list[bytes]:
    return list(read_events(file.writer, tail, user, ALL).events)


def sealed(writer: GroupWriter) -> None:
    seals = [Seal(user, Epoch(1), "a") for user in USERS]
    assert all(isinstance(outcome, Sealed) for outcome in writer.commit(seals).outcomes)


def event(number: int, user: UserKey) -> Append:
    stored = StoredEvent(b"%d" % number, "main")
    return Append(user, Epoch(1), number, Sequence(number), (stored,), ())


def test_database_of_version_1_is_brought_to_this_one_with_all_it_holds(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "events.db")
    old.executescript(VERSION_1.replace("0600000031", "0200000031"))
    old.close()
    for _ in range(2):  # Once to change it, once to find it changed.
        file = open_database(tmp_path)
        assert file.log_id == "the-log"
        assert payloads(file, file.tail, USERS[0]) == [b"1", b"2", b"3"]
        page = read_events(file.writer, file.tail, USERS[0], ReadRange(conversation=True))
        assert page.events == (b"3",)
        assert read_summary(file.writer, "x") == LogSummary("x", 1, 3, 4, 0)
        assert file.writer.execute("PRAGMA user_version").fetchone() == (2,)
        assert file.writer.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        file.close()
    file = open_database(tmp_path)
    writer = GroupWriter(file.writer, file.tail, lambda: StreamId("new"))
    following = Append(USERS[0], Epoch(4), 3, Sequence(4), (StoredEvent(b"4", "main"),), ())
    assert writer.commit([following]).outcomes == [Committed(Sequence(5))]
    assert payloads(file, file.tail, USERS[0]) == [b"1", b"2", b"3", b"4"]
    file.close()


def test_change_of_layout_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    old = sqlite3.connect(path)
    old.executescript(VERSION_1)
    # The last step of the change will not find it.
    old.execute("DROP INDEX chunk_of_stream")
    old.close()
    with pytest.raises(EnvironmentUnusable, match="event log"):
        open_database(tmp_path)
    left = sqlite3.connect(path)
    assert left.execute("PRAGMA user_version").fetchone() == (1,)
    tables = {name for (name,) in left.execute("SELECT name FROM sqlite_master")}
    assert "chunk_index" not in tables
    left.close()


@pytest.mark.parametrize("together", [2, 1000])
def test_start_indexes_what_the_process_before_did_not_get_to(
    tmp_path: Path, together: int
) -> None:
    file = open_database(tmp_path)
    writer = GroupWriter(
        file.writer, Tail(0, window=1000, together=together), lambda: StreamId("s")
    )
    sealed(writer)
    for number in range(1, 6):
        writer.commit([event(number, user) for user in USERS[:2]])
    writer.commit([event(1, USERS[4])])
    indexed = file.writer.execute("SELECT count(*) FROM chunk_index").fetchone()[0]
    assert indexed == (8 if together == 2 else 0)
    file.close()
    again = open_database(tmp_path)
    assert again.writer.execute("SELECT count(*) FROM chunk_index").fetchone() == (11,)
    assert again.tail.of(USERS[0]) == ()
    assert payloads(again, again.tail, USERS[0]) == [b"1", b"2", b"3", b"4", b"5"]
    assert payloads(again, again.tail, USERS[4]) == [b"1"]
    again.close()


def test_quiet_streams_leave_the_tail_too_so_that_a_start_has_little_to_do(tmp_path: Path) -> None:
    file = open_database(tmp_path)
    tail = Tail(0, window=20, together=10)
    writer = GroupWriter(file.writer, tail, lambda: StreamId("s"))
    sealed(writer)
    writer.commit([event(1, USERS[0])])
    for number in range(1, 101):
        writer.commit([event(number, USERS[1])])
    behind = "SELECT max(id) - (SELECT indexed FROM meta) FROM chunk"
    assert file.writer.execute(behind).fetchone()[0] <= 21
    assert tail.of(USERS[0]) == ()
    assert payloads(file, tail, USERS[0]) == [b"1"]
    file.close()


def test_reader_at_any_moment_sees_all_that_was_committed_and_no_hole(tmp_path: Path) -> None:
    file = open_database(tmp_path)
    tail = Tail(0, window=40, together=3)
    writer = GroupWriter(file.writer, tail, lambda: StreamId("s"))
    sealed(writer)
    committed = [0] * len(USERS)
    wrong: list[str] = []
    looks = [0]
    done = threading.Event()

    def read() -> None:
        connection = file.reader()
        while not done.is_set():
            for at, user in enumerate(USERS):
                before = committed[at]
                page = read_events(connection, tail, user, ALL)
                looks[0] += 1
                expected = tuple(range(1, len(page.events) + 1))
                if page.sequences != expected or page.head != len(expected):
                    wrong.append(f"{user} has a hole: {page.sequences} of {page.head}")
                if len(expected) < before:
                    wrong.append(f"{user} misses {before - len(expected)} events")
        connection.close()

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    try:
        for turn in range(200):
            chosen = range(1 + turn % len(USERS))
            group = [event(committed[at] + 1, USERS[at]) for at in chosen]
            outcomes = writer.commit(group).outcomes
            assert all(isinstance(outcome, Committed) for outcome in outcomes)
            for at in chosen:
                committed[at] += 1
    finally:
        done.set()
        for thread in readers:
            thread.join()
    assert not wrong, wrong[:3]
    assert looks[0] > 20
    file.close()
