"""What only the SQLite engine has: its lock, its failure, and that rows do what the rules say."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from agent_service.core.journal import (
    Append,
    Committed,
    Record,
    RecordKind,
    Seal,
    Sealed,
    StoredEvent,
)
from agent_service.log import sqlite as sqlite_module
from agent_service.log.database import DatabaseFile, open_database
from agent_service.log.memory import LogState
from agent_service.log.port import LogFailed, LogFull, OpenRunPage, ReadRange
from agent_service.log.reader import (
    OPEN_RUNS,
    SUMMARY,
    read_events,
    read_open_runs,
    read_summary,
    read_threads,
)
from agent_service.log.rules import MOST_WAITING
from agent_service.log.sqlite import SqliteLog
from agent_service.log.tail import Tail
from agent_service.log.writer import GroupWriter
from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, Sequence, StreamId, UserKey
from steward.runtime.service import EnvironmentUnusable
from steward.telemetry.catalog import LogMetrics

ALICE = UserKey("default", "alice")


def make_log(data: Path) -> SqliteLog:
    return SqliteLog(data, LogMetrics(CollectorRegistry()))


def append_of(number: int, payload: bytes = b"x") -> Append:
    event = StoredEvent(payload, "main")
    return Append(ALICE, Epoch(1), number, Sequence(number), (event,), ())


def seals_of(name: str, number: int) -> list[Seal]:
    return [Seal(UserKey("default", f"{name}{i}"), Epoch(1), "a") for i in range(number)]


async def submitted(log: SqliteLog, seals: list[Seal]) -> None:
    """They are durable."""
    told: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    log.submit(seals, 0, told.set_result)
    await told


@pytest.mark.asyncio
async def test_a_busy_log_lets_company_come_before_it_begins_the_next_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_module, "PACE_S", 0.5)
    registry = CollectorRegistry()
    log = SqliteLog(tmp_path, LogMetrics(registry))
    await log.open()

    def groups() -> float:
        return registry.get_sample_value("steward_log_commit_seconds_count") or 0.0

    began = time.monotonic()
    await submitted(log, seals_of("many", sqlite_module.BUSY))
    before = groups()
    first = asyncio.create_task(submitted(log, seals_of("early", 1)))
    await asyncio.sleep(0.05)
    await asyncio.gather(first, submitted(log, seals_of("late", 1)))
    assert groups() == before + 1, "both in one group"
    assert time.monotonic() - began >= 0.5
    await log.close()


@pytest.mark.asyncio
async def test_a_log_with_little_to_do_writes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_module, "PACE_S", 60.0)
    log = make_log(tmp_path)
    await log.open()
    began = time.monotonic()
    for number in range(5):
        await submitted(log, seals_of(f"few{number}-", sqlite_module.BUSY - 1))
    assert time.monotonic() - began < sqlite_module.PACE_S
    await log.close()


@pytest.mark.asyncio
async def test_second_opener_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    first = make_log(tmp_path)
    await first.open()
    with pytest.raises(EnvironmentUnusable, match="another process"):
        await make_log(tmp_path).open()
    await first.close()
    again = make_log(tmp_path)
    await again.open()
    assert again.log_id == first.log_id
    await again.close()


@pytest.mark.asyncio
async def test_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "events.db").write_bytes(b"this is no database, it is a letter" * 100)
    with pytest.raises(EnvironmentUnusable, match="event log"):
        await make_log(tmp_path).open()
    (tmp_path / "events.db").unlink()
    log = make_log(tmp_path)
    await log.open()
    await log.close()
    file = open_database(tmp_path)
    file.writer.execute("PRAGMA user_version = 99")
    file.close()
    with pytest.raises(EnvironmentUnusable, match="version 99"):
        await make_log(tmp_path).open()


@pytest.mark.asyncio
async def test_full_disk_fails_every_waiter_and_all_that_comes_later(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    await log.open()
    assert isinstance(await log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)
    assert await log.append(append_of(1)) == Committed(Sequence(2))
    pages = log._file.writer.execute("PRAGMA page_count").fetchone()[0]
    log._file.writer.execute(f"PRAGMA max_page_count = {pages + 1}")
    other = log.seal(Seal(UserKey("t", "u"), Epoch(1), "b"))
    big = log.append(append_of(2, b"x" * 100_000))
    outcomes = await asyncio.gather(big, other, return_exceptions=True)
    assert isinstance(outcomes[0], LogFailed)
    assert isinstance(await asyncio.wait_for(log.failed(), 5), LogFailed)
    with pytest.raises(LogFailed):
        await log.append(append_of(2))
    with pytest.raises(LogFailed):
        await log.read(ALICE, ReadRange())
    await log.close()
    again = make_log(tmp_path)
    await again.open()
    assert (await again.read(ALICE, ReadRange())).events == (b"x",)
    await again.close()


@pytest.mark.asyncio
async def test_damaged_page_found_by_a_read_fails_the_log(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    await log.open()
    assert isinstance(await log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)
    for number in range(1, 200):
        assert await log.append(append_of(number, b"x" * 500)) == Committed(Sequence(number + 1))
    await log.close()
    open_database(tmp_path).close()  # Indexes all of them, so that the next start reads no more.
    path = tmp_path / "events.db"
    damaged = bytearray(path.read_bytes())
    damaged[4096 * 12 : 4096 * 20] = b"\xff" * (4096 * 8)
    path.write_bytes(damaged)
    log = make_log(tmp_path)
    await log.open()
    with pytest.raises(LogFailed):
        await log.read(ALICE, ReadRange(limit=1000, max_bytes=1 << 22))
    assert isinstance(await asyncio.wait_for(log.failed(), 5), LogFailed)
    await log.close()


@pytest.mark.asyncio
async def test_reads_go_on_while_the_writer_is_in_a_transaction(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    await log.open()
    assert isinstance(await log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)
    assert await log.append(append_of(1)) == Committed(Sequence(2))
    log._file.writer.execute("BEGIN IMMEDIATE")
    log._file.writer.execute("UPDATE stream SET fence = 9")
    page = await asyncio.wait_for(log.read(ALICE, ReadRange()), 5)
    assert page.events == (b"x",)
    assert (await log.describe()).largest_fence == 1
    log._file.writer.execute("ROLLBACK")
    await log.close()


@pytest.mark.asyncio
async def test_what_waits_is_bounded(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    await log.open()
    seals = [Seal(ALICE, Epoch(1), "a")] * MOST_WAITING
    answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    log.submit(seals, 0, lambda outcomes: answered.set_result(len(outcomes)))
    with pytest.raises(LogFull):
        log.append(append_of(1))
    assert await asyncio.wait_for(answered, 20) == MOST_WAITING
    assert await log.append(append_of(1)) == Committed(Sequence(2))
    await log.close()


@pytest.mark.asyncio
async def test_close_commits_what_waits(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    await log.open()
    assert isinstance(await log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)
    future = log.append(append_of(1))
    await log.close()
    assert await future == Committed(Sequence(2))


def test_takeover_in_the_group_of_the_last_append_starts_a_new_count(tmp_path: Path) -> None:
    state = Record(RecordKind.STATE, "state", b"{}")
    last = Append(ALICE, Epoch(1), 1, Sequence(1), (), (state,))
    file = open_database(tmp_path)
    writer = GroupWriter(file.writer, file.tail, lambda: StreamId("s"))
    outcomes = writer.commit(
        [Seal(ALICE, Epoch(1), "a"), last, Seal(ALICE, Epoch(2), "b")]
    ).outcomes
    assert outcomes[2] == Sealed(StreamId("s"), Sequence(1), Sequence(1), (state,), 0)
    file.close()
    file = open_database(tmp_path)
    writer = GroupWriter(file.writer, file.tail, lambda: StreamId("s"))
    first = Append(ALICE, Epoch(2), 1, Sequence(1), (StoredEvent(b"1", "main"),), ())
    assert writer.commit([first]).outcomes == [Committed(Sequence(2))]
    assert read_events(file.writer, file.tail, ALICE, ReadRange()).events == (b"1",)
    file.close()


USERS = [UserKey("t", "u"), UserKey("t/u", "")]
users = st.sampled_from([*USERS, USERS[0], USERS[0]])
events = st.lists(
    st.builds(
        StoredEvent,
        st.binary(max_size=12),
        st.sampled_from(["main", "side", "é"]),
        st.booleans(),
    ),
    max_size=4,
).map(tuple)
values = st.sampled_from([b'{"sequence": 1}', b'{"sequence": 2}', b'{"sequence": 1, "title": "x"}'])
kinds = st.sampled_from([*RecordKind, RecordKind.THREAD, RecordKind.THREAD, RecordKind.THREAD])
deleted = st.sampled_from([False, False, False, True])
records = st.lists(
    st.builds(
        Record, kinds, st.sampled_from("abcd"), values, st.sampled_from([False] * 3 + [True])
    ),
    max_size=4,
).map(tuple)
# Offsets to what a correct manager would send: 0 is right, the others are stale or ahead.
off_epochs = st.sampled_from([0, 1, 1, -1])
off_numbers = st.sampled_from([0] * 6 + [1, -1])
off_sequences = st.sampled_from([0] * 6 + [1])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("seal"), users, off_epochs, st.sampled_from("xxy")),
        st.tuples(st.just("append"), users, off_numbers, off_sequences, events, records),
        st.tuples(st.just("append"), users, off_numbers, off_sequences, st.just(()), records),
        st.sampled_from([("commit",), ("restart",)]),
    ),
    min_size=5,
    max_size=30,
)
ranges = st.builds(
    ReadRange,
    after=st.integers(0, 12),
    until=st.integers(0, 12),
    limit=st.integers(1, 6),
    max_bytes=st.integers(1, 40),
    thread_id=st.sampled_from(["", "main", "side", "é"]),
    newest=st.booleans(),
    conversation=st.booleans(),
)


def listing(page: Callable[[], OpenRunPage]) -> OpenRunPage | Reason:
    """The page, or why there is none."""
    try:
        return page()
    except StewardError as refused:
        return refused.reason


def test_open_runs_and_totals_are_read_without_a_walk_over_streams(tmp_path: Path) -> None:
    file = open_database(tmp_path)

    def plan(query: str, *values: object) -> list[str]:
        rows = file.writer.execute("EXPLAIN QUERY PLAN " + query, values).fetchall()
        return [row[3] for row in rows]

    scans = plan(OPEN_RUNS, 0, 10)
    assert "SEARCH record USING COVERING INDEX open_run (stream>?)" in scans
    assert "SEARCH stream USING INTEGER PRIMARY KEY (rowid=?)" in scans
    totals = plan(SUMMARY)
    assert totals == ["SCAN meta", "SCALAR SUBQUERY 1", "SCAN record USING COVERING INDEX open_run"]
    file.close()


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=steps,
    wanted=st.lists(ranges, min_size=5, max_size=5),
    heads=st.sampled_from([1, 9]),
    window=st.sampled_from([0, 3, 1000]),
    together=st.sampled_from([1, 2, 4, 1000]),
)
def test_rows_do_what_the_rules_in_memory_do(
    tmp_path_factory: pytest.TempPathFactory, steps, wanted, heads, window, together
) -> None:
    """Any operations, cut into any groups, restarted anywhere: same outcomes, same reads."""
    data = tmp_path_factory.mktemp("log")
    names, rule_names = count(), count()

    def name_stream() -> StreamId:
        return StreamId(f"s{next(names)}")

    def open_writer() -> tuple[DatabaseFile, GroupWriter, Tail]:
        file = open_database(data)
        tail = Tail(file.tail.last_id, window=window, together=together)
        return file, GroupWriter(file.writer, tail, name_stream, most_heads=heads), tail

    state = LogState(lambda: StreamId(f"s{next(rule_names)}"))
    file, writer, tail = open_writer()
    group: list[Seal | Append] = []
    expected: list[object] = []

    def commit() -> None:
        assert writer.commit(group).outcomes == expected
        group.clear()
        expected.clear()
        for user in USERS:
            everything = ReadRange(limit=1000)
            assert read_events(file.writer, tail, user, everything) == state.read(user, everything)

    known = {user: (Epoch(1), 0, 1) for user in USERS}
    for step in steps:
        match step:
            case ("commit",):
                commit()
            case ("restart",):
                commit()
                file.close()
                file, writer, tail = open_writer()
            case ("seal", user, off_epoch, activation):
                epoch = Epoch(max(known[user][0] + off_epoch, 1))
                seal = Seal(user, epoch, activation)
                sealed = state.seal(seal)
                if isinstance(sealed, Sealed):
                    known[user] = (epoch, sealed.last_append_number, sealed.next_sequence)
                group.append(seal)
                expected.append(sealed)
            case ("append", user, off_number, off_sequence, its_events, its_records):
                epoch, number, following = known[user]
                number = max(number + 1 + off_number, 1)
                expects = Sequence(following + off_sequence)
                append = Append(user, epoch, number, expects, its_events, its_records)
                outcome = state.append(append)
                if isinstance(outcome, Committed):
                    known[user] = (epoch, number, outcome.next_sequence)
                group.append(append)
                expected.append(outcome)
    commit()
    reader = file.reader()
    for user in USERS:
        for one in wanted:
            assert read_events(reader, tail, user, one) == state.read(user, one)
        page = ""
        while True:
            listed = read_threads(reader, user, 2, page)
            assert listed == state.threads(user, 2, page)
            page = listed[1]
            if not page:
                break
    assert read_summary(reader, "x") == state.summary("x")
    for after in (None, *USERS):
        for limit in (1, 2, 9):
            rows = listing(partial(read_open_runs, reader, after, limit))
            assert rows == listing(partial(state.open_runs, after, limit))
    assert file.writer.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    reader.close()
    file.close()
