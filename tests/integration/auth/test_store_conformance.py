"""What every auth store must do, and what the embedded one must keep."""

import asyncio
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from auth_service.core.grants import Login, Ticket, digest_of
from auth_service.store.memory import MemoryAuthStore
from auth_service.store.port import AuthStore, Keep, Mark, StoreFailed, Take
from auth_service.store.postgres.connecting import Database
from auth_service.store.postgres.engine import PostgresAuthStore
from auth_service.store.sqlite import SqliteAuthStore
from steward.model.identity import Identity
from steward.model.keys import UserKey
from steward.runtime.service import EnvironmentUnusable

NOW = 1_800_000_000_000
ALICE = UserKey("default", "alice")
IDENTITY = Identity(ALICE, ("chat", "history:read"), NOW + 60_000, NOW - 7, "t1")
TICKET = Ticket(IDENTITY, "https://app.example", NOW + 30_000)
LOGIN = Login(UserKey("acme", "bob"), ("chat",), NOW, NOW + 600_000)

A, B = digest_of("a"), digest_of("b")


@pytest_asyncio.fixture(params=["memory", "sqlite", "postgres", "pgbouncer"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AuthStore]:
    made: dict[str, Callable[[], AuthStore]] = {
        "memory": MemoryAuthStore,
        "sqlite": lambda: SqliteAuthStore(tmp_path / "auth.db"),
    }
    if request.param in made:
        store = made[request.param]()
        yield store
        await store.close()
        return
    server = request.getfixturevalue("postgres_server")
    pooled = request.param == "pgbouncer"
    port = request.getfixturevalue("pooler").port if pooled else 0
    name = await server.make_database()
    postgres = PostgresAuthStore(Database(server.url(name, port=port), pooled))
    await postgres.open()
    yield postgres
    await postgres.close()
    await server.drop_database(name)


async def marks(store: AuthStore) -> dict[UserKey, int]:
    """All that a store tells who begins to follow it."""
    known: dict[UserKey, int] = {}
    await store.follow(known.update)
    assert store.unsure() is None
    return known


@pytest.mark.asyncio
async def test_a_secret_is_handed_out_exactly_as_it_was_kept(store: AuthStore) -> None:
    assert await store.apply([Keep(A, TICKET), Keep(B, LOGIN)], NOW) == [None, None]
    assert await store.apply([Take(A), Take(B)], NOW) == [TICKET, LOGIN]


@pytest.mark.asyncio
async def test_a_secret_is_handed_out_once_within_a_batch_and_after_it(store: AuthStore) -> None:
    await store.apply([Keep(A, TICKET)], NOW)
    assert await store.apply([Take(A), Take(A)], NOW) == [TICKET, None]
    assert await store.apply([Take(A)], NOW) == [None]


@pytest.mark.asyncio
async def test_of_many_concurrent_takers_exactly_one_wins(store: AuthStore) -> None:
    await store.apply([Keep(A, TICKET)], NOW)
    results = await asyncio.gather(*(store.apply([Take(A)], NOW) for _ in range(50)))
    assert sorted(results, key=str) == [[None]] * 49 + [[TICKET]]


@pytest.mark.asyncio
async def test_an_unknown_secret_gives_nothing(store: AuthStore) -> None:
    assert await store.apply([Take(A)], NOW) == [None]


@pytest.mark.asyncio
async def test_an_expired_secret_is_as_good_as_absent(store: AuthStore) -> None:
    await store.apply([Keep(A, TICKET), Keep(B, LOGIN)], NOW)
    assert await store.apply([Take(A), Take(B)], TICKET.expires_at_ms) == [None, LOGIN]


@pytest.mark.asyncio
async def test_marks_are_kept_per_user_and_only_grow(store: AuthStore) -> None:
    other = UserKey("acme", "alice")
    await store.apply([Mark(ALICE, 10), Mark(other, 5)], NOW)
    await store.apply([Mark(ALICE, 7), Mark(other, 9)], NOW)
    assert await marks(store) == {ALICE: 10, other: 9}


@pytest.mark.asyncio
async def test_one_batch_may_hold_everything(store: AuthStore) -> None:
    await store.apply([Keep(A, TICKET)], NOW)
    mark = Mark(UserKey("a\\b", "c\0d"), 3)
    changes = [Keep(B, LOGIN), Take(A), mark, Mark(ALICE, 4), Mark(ALICE, 2), Take(B), Take(A)]
    results = await store.apply(changes, NOW)
    assert results == [None, TICKET, None, None, None, LOGIN, None]
    assert await marks(store) == {mark.user: 3, ALICE: 4}


@pytest.mark.asyncio
async def test_a_caller_who_gave_up_harms_nobody(store: AuthStore) -> None:
    await store.apply([Keep(A, TICKET)], NOW)
    given_up = asyncio.ensure_future(store.apply([Mark(ALICE, 3)], NOW))
    await asyncio.sleep(0)  # Lets it begin.
    given_up.cancel()
    assert await store.apply([Take(A)], NOW) == [TICKET]
    await asyncio.wait({given_up})


@pytest.mark.asyncio
async def test_a_reopened_file_knows_marks_and_unused_secrets_and_no_used_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "auth.db"
    first = SqliteAuthStore(path)
    await first.apply([Keep(A, TICKET), Keep(B, LOGIN), Mark(ALICE, 10)], NOW)
    await first.apply([Take(A)], NOW)
    await first.close()
    second = SqliteAuthStore(path)
    assert await marks(second) == {ALICE: 10}
    assert await second.apply([Take(A), Take(B)], NOW) == [None, LOGIN]
    await second.close()


@pytest.mark.asyncio
async def test_the_file_holds_no_secret_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "auth.db"
    store = SqliteAuthStore(path)
    secret = "a-secret-that-nobody-may-find"
    await store.apply([Keep(digest_of(secret), TICKET)], NOW)
    await store.close()
    assert_private_and_without(secret.encode(), tmp_path)


def assert_private_and_without(secret: bytes, directory: Path) -> None:
    files = list(directory.iterdir())
    assert files
    for file in files:
        assert secret not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.asyncio
async def test_a_second_owner_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("auth_service.store.sqlite.LOCK_WAIT_S", 0.05)
    first = SqliteAuthStore(tmp_path / "auth.db")
    with pytest.raises(EnvironmentUnusable, match="another auth process"):
        SqliteAuthStore(tmp_path / "auth.db")
    await first.close()


@pytest.mark.asyncio
async def test_a_file_that_is_no_database_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "auth.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(EnvironmentUnusable, match=r"auth\.db"):
        SqliteAuthStore(path)


@pytest.mark.asyncio
async def test_an_engine_that_fails_refuses_all_who_wait_and_says_so(tmp_path: Path) -> None:
    store = SqliteAuthStore(tmp_path / "auth.db")
    await store.apply([Keep(A, TICKET)], NOW)
    # The same digest twice breaks the primary key, as nothing in the service ever does.
    results = await asyncio.gather(
        store.apply([Take(A), Keep(B, TICKET), Keep(B, TICKET)], NOW),
        store.apply([Take(A)], NOW),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [StoreFailed, StoreFailed]
    async with asyncio.timeout(1):
        await store.failed()
    with pytest.raises(StoreFailed):
        await store.apply([Take(A)], NOW)
    await store.close()
    reopened = SqliteAuthStore(tmp_path / "auth.db")
    assert await reopened.apply([Take(A), Take(B)], NOW) == [TICKET, None]
    await reopened.close()
