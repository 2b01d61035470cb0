"""What only the PostgreSQL log can get wrong: tenants, races of processes, outages, upgrades."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from agent_service.core.journal import (
    Append,
    Committed,
    Conflict,
    Fenced,
    Record,
    RecordKind,
    Seal,
    Sealed,
    StoredEvent,
)
from agent_service.log.packing import pack
from agent_service.log.port import LogFailed, ReadRange
from agent_service.log.postgres import engine, groups, reader
from agent_service.log.postgres.connecting import Database
from agent_service.log.postgres.engine import PostgresLog
from agent_service.log.postgres.migrator import MIGRATIONS
from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, Sequence, StreamId, UserKey
from steward.postgres.texts import original, stored
from steward.runtime.service import EnvironmentUnusable
from steward.telemetry.catalog import LogMetrics
from steward.testing.postgres import PostgresServer
from steward.testing.proxy import CutProxy
from steward.testing.waiting import eventually

pytestmark = pytest.mark.asyncio

ALICE = UserKey("default", "alice")
WAIT_S = 30.0


def make_log(url: str, **options: Any) -> PostgresLog:
    return PostgresLog(Database(url), LogMetrics(CollectorRegistry()), **options)


@pytest_asyncio.fixture
async def database(postgres_server: PostgresServer) -> AsyncIterator[str]:
    name = await postgres_server.make_database()
    yield name
    await postgres_server.drop_database(name)


@pytest_asyncio.fixture
async def log(postgres_server: PostgresServer, database: str) -> AsyncIterator[PostgresLog]:
    log = make_log(postgres_server.url(database))
    await log.open()
    yield log
    await log.close()


def append(seal: Seal, number: int, first: int, *texts: str) -> Append:
    events = tuple(StoredEvent(text.encode(), "main") for text in texts)
    return Append(seal.user, seal.epoch, number, Sequence(first), events, ())


async def texts(log: PostgresLog, user: UserKey = ALICE) -> list[str]:
    found: list[str] = []
    while True:
        page = await log.read(user, ReadRange(after=len(found), limit=1000))
        found += [payload.decode() for payload in page.events]
        if not page.more:
            return found


# ---- setting up


async def test_a_role_that_row_security_does_not_bind_is_refused(
    postgres_server: PostgresServer, database: str
) -> None:
    log = make_log(postgres_server.url(database, role="postgres"))
    with pytest.raises(EnvironmentUnusable, match="row-level security"):
        await log.open()
    await log.close()


async def test_a_database_that_is_not_there_is_named(postgres_server: PostgresServer) -> None:
    log = make_log(postgres_server.url("nowhere"))
    with pytest.raises(EnvironmentUnusable, match="nowhere"):
        await log.open()
    await log.close()


async def test_processes_that_start_together_migrate_once(
    postgres_server: PostgresServer, database: str
) -> None:
    logs = [make_log(postgres_server.url(database)) for _ in range(4)]
    await asyncio.gather(*(log.open() for log in logs))
    assert len({log.log_id for log in logs}) == 1
    connection = await asyncpg.connect(postgres_server.url(database))
    rows = await connection.fetch("SELECT number FROM steward.version")
    await connection.close()
    assert [row["number"] for row in rows] == list(range(1, len(MIGRATIONS) + 1))
    await asyncio.gather(*(log.close() for log in logs))


async def test_a_database_of_a_newer_program_is_refused(
    postgres_server: PostgresServer, database: str, log: PostgresLog
) -> None:
    connection = await asyncpg.connect(postgres_server.url(database))
    await connection.execute("INSERT INTO steward.version VALUES (1000)")
    await connection.close()
    late = make_log(postgres_server.url(database))
    with pytest.raises(EnvironmentUnusable, match="newer program"):
        await late.open()
    await late.close()


async def test_a_database_that_is_away_at_the_start_is_waited_for(
    own_server: PostgresServer,
) -> None:
    name = await own_server.make_database()
    own_server.end()
    log = make_log(own_server.url(name))
    opening = asyncio.create_task(log.open())
    await eventually(lambda: "out of reach" in (log.away or ""), "it says why")
    assert not opening.done()
    await asyncio.to_thread(own_server.start)
    async with asyncio.timeout(WAIT_S):
        await opening
    assert log.away is None
    await log.close()


# ---- tenants


async def test_no_query_sees_a_tenant_that_its_transaction_did_not_name(
    postgres_server: PostgresServer, database: str, log: PostgresLog
) -> None:
    record = Record(RecordKind.STATE, "state", b"{}")
    thread = Record(RecordKind.THREAD, "main", b'{"sequence": 1, "title": "t"}')
    for tenant in ("acme", "globex"):
        seal = Seal(UserKey(tenant, "bob"), Epoch(1), "a")
        await log.seal(seal)
        event = StoredEvent(tenant.encode(), "main")
        await log.append(Append(seal.user, Epoch(1), 1, Sequence(1), (event,), (record, thread)))
    connection = await asyncpg.connect(postgres_server.url(database))
    tables = ("stream", "chunk", "record", "thread")

    async def seen(table: str) -> set[str]:
        return {row[0] for row in await connection.fetch(f"SELECT tenant FROM steward.{table}")}

    for table in tables:
        assert await seen(table) == set(), "nothing was named"
    async with connection.transaction():
        await connection.execute("SET LOCAL steward.tenants = '{acme}'")
        for table in tables:
            assert await seen(table) == {"acme"}
            parts = [await seen(f"{table}_{part}") for part in range(8)]
            assert parts == [set()] * 8, "not even past the parent"
        assert await connection.execute("DELETE FROM steward.record") == "DELETE 1"
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with connection.transaction():
            await connection.execute("SET LOCAL steward.tenants = '{acme}'")
            await connection.execute("UPDATE steward.stream SET tenant = 'globex'")
    await connection.close()
    assert (await log.read(UserKey("globex", "bob"), ReadRange())).events == (b"globex",)


async def test_any_text_comes_back_from_a_column() -> None:
    alphabet = ["\0", "\\", "0", "a", "\\0"]
    rng = random.Random(1)
    seen: dict[str, str] = {}
    for _ in range(5000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(6)))
        kept = stored(text)
        assert "\0" not in kept and original(kept) == text
        assert seen.setdefault(kept, text) == text


# ---- races of processes


async def test_of_two_processes_that_write_for_one_user_the_higher_epoch_has_the_last_word(
    postgres_server: PostgresServer, database: str, log: PostgresLog
) -> None:
    other = make_log(postgres_server.url(database))
    await other.open()
    user = UserKey("default", "raced")
    committed: list[tuple[int, int, str]] = []

    async def manager(engine: PostgresLog, epoch: int) -> None:
        """Seal, then write until somebody with a higher epoch stops it."""
        seal = Seal(user, Epoch(epoch), f"m{epoch}")
        sealed = await engine.seal(seal)
        if isinstance(sealed, Fenced):
            return
        following = int(sealed.next_sequence)
        for number in range(1, 40):
            text = f"{epoch}.{number}"
            outcome = await engine.append(append(seal, number, following, text))
            assert not isinstance(outcome, Conflict), "the fence is met before a conflict"
            if isinstance(outcome, Fenced):
                assert outcome.fence > epoch
                return
            committed.append((following, epoch, text))
            following = int(outcome.next_sequence)

    managers = [manager(log if n % 2 else other, n) for n in range(1, 25)]
    random.Random(7).shuffle(managers)
    await asyncio.gather(*managers)
    await other.close()
    found = await texts(log, user)
    committed.sort()
    assert found == [text for _, _, text in committed]
    assert [sequence for sequence, _, _ in committed] == list(range(1, len(found) + 1))
    epochs = [epoch for _, epoch, _ in committed]
    assert epochs == sorted(epochs) and epochs[-1] == 24


async def test_the_same_append_from_two_processes_is_written_once(
    postgres_server: PostgresServer, database: str, log: PostgresLog
) -> None:
    other = make_log(postgres_server.url(database))
    await other.open()
    for round_ in range(30):
        seal = Seal(UserKey("default", f"u{round_}"), Epoch(1), "a")
        await log.seal(seal)
        one = append(seal, 1, 1, "once")
        outcomes = await asyncio.gather(log.append(one), other.append(one))
        assert outcomes == [Committed(Sequence(2))] * 2
        assert await texts(log, seal.user) == ["once"]
    await other.close()
    assert (await log.describe()).events == 30


async def test_groups_that_hold_the_same_users_never_wait_for_each_other_for_ever(
    postgres_server: PostgresServer, database: str, log: PostgresLog
) -> None:
    other = make_log(postgres_server.url(database))
    await other.open()
    users = [UserKey("default", f"u{n}") for n in range(40)]
    for round_ in range(1, 6):
        calls = []
        for side, name in ((log, "left"), (other, "right")):
            order = list(users)
            random.Random(f"{round_}{name}").shuffle(order)
            calls += [side.seal(Seal(user, Epoch(round_), name)) for user in order]
        async with asyncio.timeout(WAIT_S):
            outcomes = await asyncio.gather(*calls)
        assert sum(isinstance(outcome, Sealed) for outcome in outcomes) == len(users)
    await other.close()


async def test_a_seal_and_an_append_of_one_user_never_wait_for_each_other_for_ever(
    postgres_server: PostgresServer, database: str, log: PostgresLog
) -> None:
    ann, bob, zoe = (UserKey("default", name) for name in ("ann", "bob", "zoe"))
    for user in (ann, bob):
        await log.seal(Seal(user, Epoch(1), "a"))
    url = postgres_server.url(database)
    holder, left, right, watcher = [await asyncpg.connect(url) for _ in range(4)]

    async def blocked(number: int) -> None:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"

        async def enough() -> bool:
            return bool(await watcher.fetchval(waiting) >= number)

        await eventually(enough, f"{number} wait for a lock")

    async with holder.transaction():
        await holder.execute("SET LOCAL steward.scope = 'all'")
        await holder.execute("SET LOCAL steward.tenants = '{default}'")
        await holder.execute("SELECT 1 FROM steward.stream WHERE user_id = 'bob' FOR UPDATE")
        # It has ann's row and waits for bob's; the totals come after both.
        appends = groups.append_arguments(
            [append(Seal(user, Epoch(1), "a"), 1, 1, "x") for user in (ann, bob)]
        )
        appending = asyncio.create_task(left.fetch(groups.APPEND, 5, *appends))
        await blocked(1)
        # It makes a stream, which changes the same totals, and waits for ann's row.
        seals = groups.seal_arguments(
            [Seal(zoe, Epoch(1), "a"), Seal(ann, Epoch(2), "b")], [StreamId("1"), StreamId("2")]
        )
        sealing = asyncio.create_task(right.fetch(groups.SEAL, 5, *seals))
        await blocked(2)
    written, sealed = await asyncio.gather(appending, sealing)
    assert written == [], "both were written"
    assert [row["sealed"] for row in sealed] == [True, True]
    for connection in (holder, left, right, watcher):
        await connection.close()


async def test_groups_of_appends_that_hold_the_same_users_never_deadlock(
    postgres_server: PostgresServer, database: str, log: PostgresLog
) -> None:
    other = make_log(postgres_server.url(database))
    await other.open()
    users = [UserKey(tenant, f"u{n}") for tenant in ("acme", "globex") for n in range(100)]
    seals = [Seal(user, Epoch(1), "a") for user in users]
    await asyncio.gather(*(log.seal(seal) for seal in seals))
    for number in range(1, 8):
        calls = []
        for side in (log, other):
            random.Random(f"{number}{side is log}").shuffle(seals)
            calls += [side.append(append(seal, number, number, "x")) for seal in seals]
        async with asyncio.timeout(WAIT_S):
            outcomes = await asyncio.gather(*calls)
        assert outcomes == [Committed(Sequence(number + 1))] * len(calls)
    await other.close()
    assert (await log.describe()).events == 7 * len(users)
    connection = await asyncpg.connect(postgres_server.url(database))
    await connection.execute("SELECT pg_stat_clear_snapshot()")
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    assert await connection.fetchval(deadlocks) == 0
    await connection.close()


async def test_in_one_group_each_append_is_judged_by_itself(log: PostgresLog) -> None:
    def long_append(seal: Seal, number: int, first: int) -> Append:
        events = tuple(StoredEvent(f"{t}{number}".encode(), t) for t in ("main", "side", "main"))
        records = (Record(RecordKind.STATE, "state", b"%d" % number),)
        return Append(seal.user, seal.epoch, number, Sequence(first), events, records)

    # In the database's order: refused ones before, between and after those that are written.
    names = ("a-fenced", "b-new", "c-conflict", "d-repeated", "e-new", "f-never-sealed")
    seals = {name: Seal(UserKey("default", name), Epoch(2), "a") for name in names}
    for name in names[:-1]:
        await log.seal(seals[name])
    await log.append(long_append(seals["d-repeated"], 1, 1))
    stale = Seal(UserKey("default", "a-fenced"), Epoch(1), "a")
    asked = [
        (long_append(seals["f-never-sealed"], 1, 1), Fenced(Epoch(0))),
        (long_append(seals["e-new"], 1, 1), Committed(Sequence(4))),
        (long_append(seals["d-repeated"], 1, 1), Committed(Sequence(4))),
        (long_append(seals["c-conflict"], 1, 2), Conflict(Sequence(1))),
        (long_append(seals["b-new"], 1, 1), Committed(Sequence(4))),
        (long_append(stale, 1, 1), Fenced(Epoch(2))),
    ]
    outcomes = await asyncio.gather(*(log.append(one) for one, _ in asked))
    assert outcomes == [expected for _, expected in asked]
    whole = ["main1", "side1", "main1"]
    for name in names:
        expected = whole if name in ("b-new", "d-repeated", "e-new") else []
        assert await texts(log, UserKey("default", name)) == expected
        sealed = await log.seal(Seal(UserKey("default", name), Epoch(3), "b"))
        assert isinstance(sealed, Sealed)
        assert [record.value for record in sealed.records] == ([b"1"] if expected else [])
    assert (await log.describe()).events == 9


async def test_what_became_possible_while_it_was_judged_is_taken_back_and_not_guessed(
    postgres_server: PostgresServer, database: str, log: PostgresLog
) -> None:
    ann, bob = (Seal(UserKey("default", name), Epoch(1), "a") for name in ("ann", "bob"))
    for seal in (ann, bob):
        await log.seal(seal)
    holder, writer = [await asyncpg.connect(postgres_server.url(database)) for _ in range(2)]
    # Nobody who keeps to the port's order does this: the second append before the first's answer.
    early = groups.append_arguments([append(ann, 1, 1, "x"), append(bob, 2, 2, "y")])

    async def waits() -> bool:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        return bool(await holder.fetchval(waiting))

    async with holder.transaction():
        # After the rows of users come the totals.
        await holder.execute("SELECT 1 FROM steward.total WHERE slot = 5 FOR UPDATE")
        writing = asyncio.create_task(writer.fetch(groups.APPEND, 5, *early))
        await eventually(waits, "it waits for the totals")
        first = groups.append_arguments([append(bob, 1, 1, "x")])
        async with asyncio.timeout(WAIT_S):
            assert await holder.fetch(groups.APPEND, 6, *first) == []
    with pytest.raises(asyncpg.SerializationError):
        await writing
    assert await texts(log, ann.user) == [], "nothing of the group"
    assert await texts(log, bob.user) == ["x"]
    assert await writer.fetch(groups.APPEND, 5, *early) == []
    assert await texts(log, bob.user) == ["x", "y"]
    for connection in (holder, writer):
        await connection.close()


async def test_a_database_of_the_first_version_is_upgraded_under_processes_that_still_use_it(
    postgres_server: PostgresServer, database: str
) -> None:
    before = await asyncpg.connect(postgres_server.url(database))
    await before.execute("CREATE SCHEMA steward")
    await before.execute("CREATE TABLE steward.version (number int PRIMARY KEY)")
    await before.execute(MIGRATIONS[0])
    await before.execute("INSERT INTO steward.version VALUES (1)")
    call = "SELECT * FROM steward.append_v1(" + ", ".join(f"${n}" for n in range(1, 23)) + ")"
    seal = Seal(ALICE, Epoch(1), "a")
    await before.fetch(groups.SEAL, 0, *groups.seal_arguments([seal], [StreamId("s")]))

    async def append_v1(number: int, text: str) -> list[tuple[int, int]]:
        (chunk,) = pack([StoredEvent(text.encode(), "main")])
        asked = [["default"], ["alice"], [1], [number], [number], [1]]
        packed = [[1], [0], [1], ["main"], [False], [chunk.packed]]
        rows = await before.fetch(call, 0, *asked, *packed, *[[] for _ in range(9)])
        return [tuple(row) for row in rows]

    assert await append_v1(1, "old") == [(groups.WRITTEN, 2)]
    log = make_log(postgres_server.url(database))
    await log.open()
    assert await log.append(append(seal, 2, 2, "new")) == Committed(Sequence(3))
    assert await append_v1(3, "old again") == [(groups.WRITTEN, 4)]
    assert await append_v1(3, "old again") == [(groups.REPEATED, 4)]
    assert await texts(log) == ["old", "new", "old again"]
    await log.close()
    await before.close()


# ---- outages


class Load:
    """Managers that write one event after another, whatever the database does."""

    def __init__(self, log: PostgresLog, users: int) -> None:
        self._log = log
        self.users = [UserKey("default", f"user-{n}") for n in range(users)]
        self.acknowledged = dict.fromkeys(self.users, 0)
        self._stop = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        for user in self.users:
            await self._log.seal(Seal(user, Epoch(1), "load"))
        self._tasks = [asyncio.create_task(self._write(user)) for user in self.users]

    async def _write(self, user: UserKey) -> None:
        seal = Seal(user, Epoch(1), "load")
        number = 0
        while not self._stop:
            number += 1
            outcome = await self._log.append(append(seal, number, number, f"{user.user}:{number}"))
            assert outcome == Committed(Sequence(number + 1))
            self.acknowledged[user] = number

    @property
    def total(self) -> int:
        return sum(self.acknowledged.values())

    async def more(self, number: int = 50) -> None:
        """Wait until so many further appends were acknowledged."""
        goal = self.total + number
        await eventually(lambda: self.total >= goal, "writes go on", WAIT_S)

    async def lost_or_repeated(self) -> list[UserKey]:
        """Stop writing; whose events are not what was acknowledged, each once and in order."""
        self._stop = True
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*self._tasks)
        return [
            user
            for user, number in self.acknowledged.items()
            if await texts(self._log, user) != [f"{user.user}:{n}" for n in range(1, number + 1)]
        ]


async def test_a_killed_server_that_comes_back_loses_and_repeats_nothing(
    own_server: PostgresServer,
) -> None:
    log = make_log(own_server.url(await own_server.make_database()))
    await log.open()
    load = Load(log, 20)
    await load.start()
    for _ in range(3):
        await load.more()
        await asyncio.to_thread(own_server.kill)
        await eventually(lambda: log.away, "it says that it is away", WAIT_S)
        with pytest.raises(StewardError) as refused:
            await log.read(ALICE, ReadRange())
        assert refused.value.reason is Reason.STORE_UNAVAILABLE
        await asyncio.to_thread(own_server.start)
        await load.more()
        await eventually(lambda: log.away is None, "it is back", WAIT_S)
    assert await load.lost_or_repeated() == []
    await log.close()


async def test_a_server_that_stood_still_loses_and_repeats_nothing(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "GROUP_S", 0.5)
    log = make_log(own_server.url(await own_server.make_database()))
    await log.open()
    load = Load(log, 20)
    await load.start()
    await load.more()
    own_server.signal(signal.SIGSTOP)
    await eventually(lambda: log.away, "it is given up", WAIT_S)
    own_server.signal(signal.SIGCONT)
    await load.more()
    assert await load.lost_or_repeated() == []
    await log.close()


async def test_an_answer_that_was_lost_is_asked_for_again_and_not_written_twice(
    postgres_server: PostgresServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "GROUP_S", 0.3)
    monkeypatch.setattr(reader, "READ_S", 1.0)
    async with CutProxy(f"127.0.0.1:{postgres_server.port}") as proxy:
        port = int(proxy.address.rpartition(":")[2])
        log = make_log(postgres_server.url(database, port=port))
        await log.open()
        load = Load(log, 20)
        await load.start()
        for _ in range(4):
            await load.more()
            proxy.cut()
            await eventually(lambda: log.away, "nothing comes back", WAIT_S)
            with pytest.raises(StewardError):
                await log.read(ALICE, ReadRange())
            await proxy.break_off()
            proxy.mend()
            await load.more()
        assert await load.lost_or_repeated() == []
        await log.close()


async def test_writes_without_an_answer_at_the_end_are_cancelled_and_not_guessed(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CLOSE_S", 0.2)
    log = make_log(own_server.url(await own_server.make_database()))
    await log.open()
    seal = Seal(ALICE, Epoch(1), "a")
    await log.seal(seal)
    own_server.kill()
    waiting = log.append(append(seal, 1, 1, "x"))
    await eventually(lambda: log.away, "the server is away", WAIT_S)
    await log.close()
    await log.close()
    assert waiting.cancelled()


async def test_a_lane_that_breaks_ends_the_log_and_leaves_nobody_waiting(
    log: PostgresLog,
) -> None:
    def broken(outcomes: object) -> None:
        raise RuntimeError("whoever asked is broken")

    log.submit([Seal(ALICE, Epoch(1), "a")], 0, broken)
    async with asyncio.timeout(WAIT_S):
        failure = await log.failed()
    assert "whoever asked is broken" in str(failure)
    with pytest.raises(LogFailed):
        await log.append(append(Seal(ALICE, Epoch(1), "a"), 1, 1, "x"))
