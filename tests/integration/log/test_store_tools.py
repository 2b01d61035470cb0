"""`steward store copy` and `check`, with the real engines: SQLite to PostgreSQL and back."""

import asyncio
import os
import signal
import sqlite3
import subprocess
from pathlib import Path

import asyncpg
import pytest
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
from agent_service.log.port import LogEngine, ReadRange
from agent_service.log.postgres.connecting import Database
from agent_service.log.postgres.engine import PostgresLog
from agent_service.log.sqlite import SqliteLog
from steward.model.keys import Epoch, Sequence, UserKey
from steward.postgres.texts import stored
from steward.telemetry.catalog import LogMetrics
from steward.testing.command import STEWARD, run_steward
from steward.testing.postgres import PostgresServer
from steward.testing.waiting import eventually

pytestmark = pytest.mark.asyncio

USERS = [UserKey(f"t{n % 3}", f"u\\{n}") for n in range(40)]


async def store(*words: object) -> "subprocess.CompletedProcess[str]":
    return await asyncio.to_thread(run_steward, "store", *words)


async def copy(source: str, destination: str) -> "subprocess.CompletedProcess[str]":
    return await store("copy", "--from", source, "--to", destination)


async def check(name: str) -> "subprocess.CompletedProcess[str]":
    return await store("check", "--store", name)


def append(user: UserKey, number: int, first: int, *texts: str) -> Append:
    events = tuple(
        StoredEvent(b'{"sequence":%d,"say":"%s"}' % (first + n, text.encode()), f"t{n % 2}", n == 1)
        for n, text in enumerate(texts)
    )
    thread = b'{"title":"title %d","sequence":%d,"updated_at":"x"}' % (number, first)
    records = (
        Record(RecordKind.THREAD, "t0", thread),
        Record(RecordKind.RUN, f"run-{number}", b"{}"),
    )
    return Append(user, Epoch(2), number, Sequence(first), events, records)


async def open_sqlite(data: Path) -> SqliteLog:
    log = SqliteLog(data, LogMetrics(CollectorRegistry()))
    await log.open()
    return log


async def open_postgres(url: str) -> PostgresLog:
    log = PostgresLog(Database(url), LogMetrics(CollectorRegistry()))
    await log.open()
    return log


async def fill(log: LogEngine, users: list[UserKey] = USERS) -> None:
    for user in users:
        assert isinstance(await log.seal(Seal(user, Epoch(2), "a")), Sealed)
        for number in range(1, 5):
            outcome = await log.append(append(user, number, 3 * number - 2, "x", "y", "z"))
            assert isinstance(outcome, Committed)


async def everything(log: LogEngine) -> list[object]:
    """All that the port gives out."""
    found: list[object] = [await log.describe(), await log.open_runs(None, 1000)]
    for user in USERS:
        found.append(await log.read(user, ReadRange()))
        found.append(await log.threads(user, 10, ""))
        found.append(await log.seal(Seal(user, Epoch(2), "a")))
    return found


async def test_a_log_is_the_same_after_it_was_moved_to_postgres_and_back(
    tmp_path: Path, postgres_server: PostgresServer
) -> None:
    url = postgres_server.url(await postgres_server.make_database())
    a, b = f"sqlite:{tmp_path / 'a'}", f"sqlite:{tmp_path / 'b'}"
    log = await open_sqlite(tmp_path / "a")
    await fill(log)
    before = await everything(log)
    await log.close()

    there = await copy(a, url)
    assert there.returncode == 0, there.stderr
    assert "480 events of 40 users" in there.stdout
    moved = await open_postgres(url)
    assert await everything(moved) == before
    busy = await copy(url, b)
    assert busy.returncode == 2 and "in use" in busy.stderr
    # Who goes on there, goes on where it was; and what was the last append is known again.
    last, more = append(USERS[0], 4, 10, "x", "y", "z"), append(USERS[0], 5, 13, "later")
    assert await moved.append(last) == Committed(Sequence(13))
    assert await moved.append(more) == Committed(Sequence(14))
    after = await everything(moved)
    checked = await check(url)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    await moved.close()

    old = await copy(a, url)
    assert old.returncode == 2 and "is old" in old.stderr
    back = await copy(url, b)
    assert back.returncode == 0, back.stderr
    home = await open_sqlite(tmp_path / "b")
    assert await everything(home) == after
    assert await home.append(more) == Committed(Sequence(14))
    assert await home.append(append(USERS[1], 5, 13, "later")) == Committed(Sequence(14))
    await home.close()
    assert (await check(b)).returncode == 0


async def test_a_second_run_copies_what_is_new_and_only_that(tmp_path: Path) -> None:
    a, b = f"sqlite:{tmp_path / 'a'}", f"sqlite:{tmp_path / 'b'}"
    log = await open_sqlite(tmp_path / "a")
    await fill(log, USERS[:30])
    await log.close()
    assert (await copy(a, b)).returncode == 0
    log = await open_sqlite(tmp_path / "a")
    await fill(log, USERS[30:])
    assert isinstance(await log.append(append(USERS[0], 5, 13, "later")), Committed)
    before = await everything(log)
    await log.close()
    again = await copy(a, b)
    assert again.returncode == 0 and "(11 copied, 29 were there)" in again.stdout, again.stdout
    log = await open_sqlite(tmp_path / "b")
    assert await everything(log) == before
    await log.close()


async def test_a_copy_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, postgres_server: PostgresServer
) -> None:
    url = postgres_server.url(await postgres_server.make_database())
    source = f"sqlite:{tmp_path / 'a'}"
    log = await open_sqlite(tmp_path / "a")
    await fill(log)
    before = await everything(log)
    await log.close()
    await (await open_postgres(url)).close()
    holder, watcher = [await asyncpg.connect(url) for _ in range(2)]
    await watcher.execute("SELECT set_config('steward.scope', 'all', false)")
    halfway = holder.transaction()
    await halfway.start()
    await holder.execute("SET LOCAL steward.tenants = '{t2}'")
    # Somebody who is in its way stops it in the middle of a stream: that of the 21st user.
    await holder.execute(
        "INSERT INTO steward.stream (tenant, user_id, stream_id, fence, activation)"
        " VALUES ($1, $2, '', 1, '')",
        *map(stored, USERS[20]),
    )
    words = ("store", "copy", "--from", source, "--to", url)
    copying = await asyncio.create_subprocess_exec(*STEWARD, *words, start_new_session=True)

    async def stopped() -> bool:
        streams = "SELECT count(*) FROM steward.stream WHERE fence = 2"
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database()"
        )
        return [await watcher.fetchval(sql) for sql in (streams, waiting)] == [20, 1]

    await eventually(stopped, "it has come that far", 30)
    # The command line has a process of the log's own do the work.
    os.killpg(copying.pid, signal.SIGKILL)
    await copying.wait()
    await halfway.rollback()
    for connection in (holder, watcher):
        await connection.close()
    again = await copy(source, url)
    assert again.returncode == 0, again.stderr
    assert "(20 copied, 20 were there)" in again.stdout
    moved = await open_postgres(url)
    assert await everything(moved) == before
    await moved.close()


async def test_ages_of_events_are_known_after_a_move_to_postgres(
    tmp_path: Path, postgres_server: PostgresServer
) -> None:
    url = postgres_server.url(await postgres_server.make_database())
    log = await open_sqlite(tmp_path)
    await fill(log)
    await log.close()
    old = sqlite3.connect(tmp_path / "events.db")
    assert old.execute("UPDATE clock SET at_ms = 1000").rowcount
    old.execute("INSERT INTO clock SELECT max(id) + 1, 2000 FROM chunk")
    old.commit()
    old.close()
    assert (await copy(f"sqlite:{tmp_path}", url)).returncode == 0
    moved = await open_postgres(url)
    assert (await moved.compact(2001, 0)).removed == 40 * 9, "of each user the last append stays"
    await moved.close()
    assert (await check(url)).returncode == 0


async def test_a_log_in_use_one_of_somebody_else_and_none_are_refused(tmp_path: Path) -> None:
    a, b = f"sqlite:{tmp_path / 'a'}", f"sqlite:{tmp_path / 'b'}"
    log = await open_sqlite(tmp_path / "a")
    await fill(log, USERS[:2])
    refused = await check(a)
    assert refused.returncode == 2 and "another process" in refused.stderr
    await log.close()
    log = await open_sqlite(tmp_path / "b")
    await fill(log, USERS[:2])
    await log.close()
    refused = await copy(a, b)
    assert refused.returncode == 2 and "another log" in refused.stderr
    assert (await check(f"sqlite:{tmp_path / 'none'}")).returncode == 2
    assert (await check("nothing")).returncode == 2


BROKEN = {
    "DELETE FROM chunk WHERE id = 2": "should follow",
    "UPDATE chunk SET packed = x'02' WHERE id = 2": "can't be read",
    "UPDATE chunk SET epoch = 9 WHERE id = 2": "epoch",
    "UPDATE stream SET fence = 1": "its fence is 1",
    "UPDATE meta SET events = events + 1": "totals",
    "DELETE FROM chunk_index WHERE chunk = 3": "index",
    "UPDATE record SET value = x'7b'": "can't be read",
    "UPDATE thread SET sequence = 5": "listed by",
    "UPDATE meta SET fence = 1": "fences above",
    "DELETE FROM stream WHERE id = 2": "without a stream",
    "UPDATE stream SET oldest = 2": "should follow",
}


async def test_check_finds_what_is_broken(tmp_path: Path) -> None:
    log = await open_sqlite(tmp_path)
    await fill(log, USERS[:3])
    await log.close()
    # Opening indexes the rest: only then may it be broken.
    assert (await check(f"sqlite:{tmp_path}")).returncode == 0
    whole = (tmp_path / "events.db").read_bytes()
    for sql, text in BROKEN.items():
        broken = sqlite3.connect(tmp_path / "events.db")
        broken.execute(sql)
        broken.commit()
        broken.close()
        found = await check(f"sqlite:{tmp_path}")
        assert found.returncode == 1, sql + found.stdout + found.stderr
        assert text in found.stdout, sql + found.stdout
        (tmp_path / "events.db").write_bytes(whole)
