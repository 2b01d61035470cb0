"""What only the auth store in PostgreSQL can get wrong: races of processes, outages, tenants."""

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence

import asyncpg
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import CollectorRegistry

from auth_service.core.grants import Grant, Login, digest_of
from auth_service.core.questions import CheckToken, LoggedIn, RedeemLogin
from auth_service.host import Authority
from auth_service.store.port import Keep, Mark, StoreFailed, Take
from auth_service.store.postgres import feed
from auth_service.store.postgres.connecting import Database
from auth_service.store.postgres.engine import PostgresAuthStore
from auth_service.store.postgres.migrations import MIGRATIONS, SCHEMA
from steward.errors import Reason, StewardError
from steward.model.identity import Identity
from steward.model.keys import UserKey
from steward.runtime.clock import wall_ms
from steward.runtime.service import EnvironmentUnusable
from steward.telemetry.catalog import AuthMetrics
from steward.testing.postgres import PostgresServer
from steward.testing.proxy import CutProxy
from steward.testing.waiting import eventually
from steward.tokens import mint

pytestmark = pytest.mark.asyncio

NOW = 1_800_000_000_000
ALICE, BOB = UserKey("default", "alice"), UserKey("acme", "bob")
LOGIN = Login(BOB, ("chat",), NOW, NOW + 600_000)
A, B = digest_of("a"), digest_of("b")
WAIT_S = 30.0


class Process:
    """What one auth process has of the store: the store, and the revocations it was told."""

    def __init__(self, url: str) -> None:
        self.store = PostgresAuthStore(Database(url))
        self.known: dict[UserKey, int] = {}

    async def start(self) -> "Process":
        await self.store.open()
        await self.store.follow(self.known.update)
        return self

    async def take(self, *digests: bytes) -> list[Grant | None]:
        return await self.store.apply([Take(digest) for digest in digests], NOW)


@pytest_asyncio.fixture
async def database(postgres_server: PostgresServer) -> AsyncIterator[str]:
    name = await postgres_server.make_database()
    yield postgres_server.url(name)
    await postgres_server.drop_database(name)


@pytest_asyncio.fixture
async def two(database: str) -> AsyncIterator[tuple[Process, Process]]:
    processes = await asyncio.gather(Process(database).start(), Process(database).start())
    yield processes[0], processes[1]
    await asyncio.gather(*(process.store.close() for process in processes))


async def execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


async def blocked_session(url: str) -> int:
    """The session of a database that waits for a lock, when there is one."""
    connection = await asyncpg.connect(url)
    async with asyncio.timeout(WAIT_S):
        while True:
            pid = await connection.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
                " AND wait_event_type = 'Lock'"
            )
            if pid is not None:
                await connection.close()
                return int(pid)
            await asyncio.sleep(0.01)


# ---- setting up


async def test_a_role_that_row_security_does_not_bind_is_refused(database: str) -> None:
    store = PostgresAuthStore(Database(database.replace("steward@", "postgres@")))
    with pytest.raises(EnvironmentUnusable, match="row-level security"):
        await store.open()
    await store.close()


async def test_a_database_that_is_not_there_is_named(postgres_server: PostgresServer) -> None:
    store = PostgresAuthStore(Database(postgres_server.url("nowhere")))
    with pytest.raises(EnvironmentUnusable, match=r"nowhere.*auth\.store"):
        await store.open()
    await store.close()


async def test_processes_that_start_together_migrate_once(database: str) -> None:
    stores = [PostgresAuthStore(Database(database)) for _ in range(4)]
    await asyncio.gather(*(store.open() for store in stores))
    connection = await asyncpg.connect(database)
    rows = await connection.fetch("SELECT number FROM steward_auth.version")
    await connection.close()
    assert [row["number"] for row in rows] == list(range(1, len(MIGRATIONS) + 1))
    await asyncio.gather(*(store.close() for store in stores))


async def test_a_connection_that_breaks_while_tables_are_made_is_made_again(
    database: str,
) -> None:
    holder = await asyncpg.connect(database)
    await holder.execute(f"SELECT pg_advisory_lock({SCHEMA.lock})")
    store = PostgresAuthStore(Database(database))
    opening = asyncio.create_task(store.open())
    await holder.fetchval("SELECT pg_terminate_backend($1)", await blocked_session(database))
    await eventually(lambda: "terminat" in (store.unsure() or ""), "it noticed", WAIT_S)
    await holder.close()
    async with asyncio.timeout(WAIT_S):
        await opening
    assert await store.apply([Keep(A, LOGIN), Take(A)], NOW) == [None, LOGIN]
    await store.close()


async def test_a_database_of_a_newer_program_is_refused(
    database: str, two: tuple[Process, Process]
) -> None:
    await execute(database, "INSERT INTO steward_auth.version VALUES (1000)")
    late = PostgresAuthStore(Database(database))
    with pytest.raises(EnvironmentUnusable, match=r"auth store's database.*newer program"):
        await late.open()
    await late.close()


async def test_tables_that_do_not_fit_end_the_store_and_all_who_wait(
    database: str, two: tuple[Process, Process]
) -> None:
    one, _ = two
    await execute(database, "DROP TABLE steward_auth.one_use")
    with pytest.raises(StoreFailed, match="one_use"):
        await one.take(A)
    async with asyncio.timeout(WAIT_S):
        await one.store.failed()
    with pytest.raises(StoreFailed):
        await one.take(A)


async def test_no_query_sees_a_revocation_of_a_tenant_that_it_did_not_name(
    database: str, two: tuple[Process, Process]
) -> None:
    await two[0].store.apply([Mark(ALICE, 1), Mark(BOB, 2)], NOW)
    connection = await asyncpg.connect(database)

    async def seen() -> set[str]:
        rows = await connection.fetch("SELECT tenant FROM steward_auth.revocation")
        return {row["tenant"] for row in rows}

    assert await seen() == set()
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with connection.transaction():
            await connection.execute("SET LOCAL steward.tenants = '{acme}'")
            assert await seen() == {"acme"}
            await connection.execute("UPDATE steward_auth.revocation SET tenant = 'default'")
    await connection.close()


# ---- several processes


async def test_a_secret_that_all_processes_ask_for_opens_once(
    two: tuple[Process, Process],
) -> None:
    secrets = [digest_of(f"s{number}") for number in range(200)]
    await two[0].store.apply([Keep(secret, LOGIN) for secret in secrets], NOW)
    # In opposite orders, so that they wait for each other as well.
    batches = [secrets[n : n + 20] for n in range(0, 200, 20)]
    asked: list[tuple[Process, Sequence[bytes]]] = []
    for batch in batches:
        asked += [(two[0], batch), (two[1], batch[::-1]), (two[0], batch), (two[1], batch)]
    results = await asyncio.gather(*(process.take(*digests) for process, digests in asked))
    handed: list[bytes] = []
    for (_, digests), grants in zip(asked, results, strict=True):
        handed += [digest for digest, grant in zip(digests, grants, strict=True) if grant]
    assert sorted(handed) == sorted(secrets)


async def test_a_revocation_is_known_to_others_soon_and_surely_when_it_is_done(
    two: tuple[Process, Process],
) -> None:
    one, other = two
    revoking = asyncio.create_task(one.store.apply([Mark(ALICE, 7)], NOW))
    await eventually(lambda: ALICE in other.known, "the other one hears of it", 5)
    await revoking
    for mark in range(8, 12):
        await one.store.apply([Mark(ALICE, mark)], NOW)
        assert other.known[ALICE] == mark or other.store.unsure()


async def test_who_takes_a_secret_has_heard_of_all_that_was_revoked_before(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "POLL_S", 3600.0)
    one, other = await Process(database).start(), await Process(database).start()
    for mark in range(1, 6):
        revoking = asyncio.create_task(one.store.apply([Mark(ALICE, mark)], NOW))
        await eventually(lambda: one.known.get(ALICE) == mark, "it is stored", 5)  # noqa: B023
        assert other.known.get(ALICE) == (mark - 1 or None)
        await other.take(A)
        assert other.known[ALICE] == mark
        revoking.cancel()
        await asyncio.wait({revoking})
    await asyncio.gather(one.store.close(), other.store.close())


async def test_revocations_that_are_made_together_are_all_heard_of(
    database: str, two: tuple[Process, Process]
) -> None:
    listener = await Process(database).start()
    marks = {UserKey(f"t{n % 3}", f"u{n}"): n + 1 for n in range(300)}
    await asyncio.gather(
        *(two[n % 2].store.apply([Mark(*mark)], NOW) for n, mark in enumerate(marks.items()))
    )
    assert listener.known == marks or listener.store.unsure()
    await eventually(lambda: listener.known == marks, "all are known", WAIT_S)
    await listener.store.close()


async def test_more_revocations_than_an_answer_holds_are_all_told(
    database: str, two: tuple[Process, Process]
) -> None:
    one, other = two
    marks = {UserKey("t", f"u{n}"): n + 1 for n in range(2 * feed.MOST_MARKS + 500)}
    await one.store.apply([Mark(*mark) for mark in marks.items()], NOW)
    assert one.known == marks, "they came with its own answer"
    await other.take(A)
    assert other.known == marks
    late = await Process(database).start()
    assert late.known == marks
    await late.store.close()


async def test_only_secrets_that_are_long_out_of_date_are_swept(
    database: str, two: tuple[Process, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = wall_ms()
    old, young = Login(BOB, (), 0, now - 700_000), Login(BOB, (), 0, now - 1)
    await two[0].store.apply([Keep(A, old), Keep(B, young)], now)
    monkeypatch.setattr(feed, "SWEEP_S", 0.0)
    sweeper = await Process(database).start()
    connection = await asyncpg.connect(database)
    async with asyncio.timeout(WAIT_S):
        while len(rows := await connection.fetch("SELECT digest FROM steward_auth.one_use")) > 1:
            await asyncio.sleep(0.05)
    assert [row["digest"] for row in rows] == [B]
    await connection.close()
    await sweeper.store.close()


# ---- outages


async def test_a_killed_server_lets_nobody_in_and_all_goes_on_when_it_is_back(
    own_server: PostgresServer,
) -> None:
    store = PostgresAuthStore(Database(own_server.url(await own_server.make_database())))
    await store.open()
    key = Ed25519PrivateKey.generate()
    authority = await Authority.open(
        key, store, AuthMetrics(CollectorRegistry()), login_token_ttl_s=60
    )
    token = mint(key, ALICE, 60, ())
    code, _ = await authority.create_login(BOB, ())
    bobs = mint(key, BOB, 60, ())
    await authority.revoke(BOB)
    await asyncio.to_thread(own_server.kill)
    await eventually(store.unsure, "it is unsure", WAIT_S)
    assert "out of reach" in (store.unsure() or "")
    answers = await authority.answer([CheckToken(token), CheckToken(bobs), RedeemLogin(code)])
    reasons = [answer.reason for answer in answers if isinstance(answer, StewardError)]
    assert reasons == [Reason.STORE_UNAVAILABLE] * 3
    for call in (authority.create_login(ALICE, ()), authority.revoke(ALICE)):
        with pytest.raises(StewardError) as refused:
            await call
        assert refused.value.reason is Reason.STORE_UNAVAILABLE
    assert "127.0.0.1" not in str(refused.value), "where the store is concerns no user"
    await asyncio.to_thread(own_server.start)
    await eventually(lambda: store.unsure() is None, "it is sure again", WAIT_S)
    answers = await authority.answer([CheckToken(token), CheckToken(bobs), RedeemLogin(code)])
    # Her revocation was refused, and counts all the same: nobody knows whether it is stored.
    reasons = [answer.reason for answer in answers if isinstance(answer, StewardError)]
    assert reasons == [Reason.TOKEN_REVOKED] * 3
    code, _ = await authority.create_login(UserKey("default", "carol"), ())
    assert isinstance((await authority.answer([RedeemLogin(code)]))[0], LoggedIn)
    await store.close()


async def test_who_stands_still_as_its_server_does_is_unsure_and_later_sure(
    own_server: PostgresServer,
) -> None:
    process = await Process(own_server.url(await own_server.make_database())).start()
    await process.store.apply([Keep(A, LOGIN), Keep(B, LOGIN)], NOW)
    own_server.signal(signal.SIGSTOP)
    with pytest.raises(StewardError) as refused:
        await process.take(A)
    assert refused.value.reason is Reason.STORE_UNAVAILABLE
    assert process.store.unsure()
    own_server.signal(signal.SIGCONT)
    await eventually(lambda: process.store.unsure() is None, "it is sure again", WAIT_S)
    # A may have been taken by the question that had no answer, or not; twice it is never given.
    assert (await process.take(A, B))[1] == LOGIN
    assert await process.take(A, B) == [None, None]
    await process.store.close()


async def test_a_secret_whose_answer_was_lost_is_neither_guessed_nor_handed_out_twice(
    postgres_server: PostgresServer, database: str
) -> None:
    name = database.rpartition("/")[2]
    async with CutProxy(f"127.0.0.1:{postgres_server.port}") as proxy:
        port = int(proxy.address.rpartition(":")[2])
        process = await Process(postgres_server.url(name, port=port)).start()
        await process.store.apply([Keep(A, LOGIN)], NOW)
        holder = await asyncpg.connect(database)
        holding = holder.transaction()
        await holding.start()
        await holder.execute("SELECT FROM steward_auth.one_use FOR UPDATE")
        taking = asyncio.create_task(process.take(A))
        await blocked_session(database)
        # The question is there; its answer won't come back.
        proxy.cut()
        await holding.rollback()
        async with asyncio.timeout(WAIT_S):
            while await holder.fetchval("SELECT count(*) FROM steward_auth.one_use"):
                await asyncio.sleep(0.01)
        await holder.close()
        await proxy.break_off()
        proxy.mend()
        with pytest.raises(StewardError) as refused:
            await taking
        assert refused.value.reason is Reason.STORE_UNAVAILABLE
        await eventually(lambda: process.store.unsure() is None, "it is back", WAIT_S)
        assert await process.take(A) == [None]
        await process.store.close()


async def test_a_revocation_whose_connection_broke_is_made_again(
    postgres_server: PostgresServer, database: str, two: tuple[Process, Process]
) -> None:
    one, other = two
    holder = await asyncpg.connect(database)
    holding = holder.transaction()
    await holding.start()
    await holder.execute("UPDATE steward_auth.last_change SET change = change")
    revoking = asyncio.create_task(one.store.apply([Mark(ALICE, 5)], NOW))
    await holder.fetchval("SELECT pg_terminate_backend($1)", await blocked_session(database))
    await holding.rollback()
    await holder.close()
    assert await revoking == [None]
    assert other.known == {ALICE: 5} or other.store.unsure()


async def test_a_server_that_lost_revocations_is_read_from_the_start(
    own_server: PostgresServer,
) -> None:
    url = own_server.url(await own_server.make_database())
    one, other = await Process(url).start(), await Process(url).start()
    await one.store.apply([Mark(ALICE, 5), Mark(BOB, 6)], NOW)
    await one.store.close()
    await asyncio.to_thread(own_server.end)
    await eventually(other.store.unsure, "it is unsure", WAIT_S)
    await asyncio.to_thread(own_server.start)
    # As a backup from before, in which another user was revoked since: her change has number 1.
    superuser = url.replace("steward@", "postgres@")
    carol = UserKey("default", "carol")
    await execute(
        superuser,
        "BEGIN",
        "DELETE FROM steward_auth.revocation",
        "INSERT INTO steward_auth.revocation VALUES ('default', 'carol', 9, 1)",
        "UPDATE steward_auth.last_change SET change = 1",
        "COMMIT",
    )
    await eventually(lambda: carol in other.known, "she is told of", WAIT_S)
    assert other.known == {ALICE: 5, BOB: 6, carol: 9}, "and nothing is forgotten here"
    await other.store.close()


async def test_a_revocation_by_one_authority_ends_what_the_other_lets_in(database: str) -> None:
    key = Ed25519PrivateKey.generate()
    stores = [PostgresAuthStore(Database(database)) for _ in range(2)]
    authorities = []
    for store in stores:
        await store.open()
        metrics = AuthMetrics(CollectorRegistry())
        authorities.append(await Authority.open(key, store, metrics, login_token_ttl_s=60))
    one, other = authorities
    pushed: list[tuple[UserKey, int]] = []
    other.subscribe(lambda user, mark: pushed.append((user, mark)))
    token = mint(key, ALICE, 60, ())
    assert isinstance((await other.answer([CheckToken(token)]))[0], Identity)
    code, _ = await other.create_login(ALICE, ())
    mark = await one.revoke(ALICE)
    for answer in await other.answer([CheckToken(token), RedeemLogin(code)]):
        assert isinstance(answer, StewardError) and answer.reason is Reason.TOKEN_REVOKED
    assert pushed == [(ALICE, mark)], "once"
    await asyncio.gather(*(store.close() for store in stores))
