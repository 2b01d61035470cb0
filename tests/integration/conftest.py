"""Real servers that several parts are tested with; each is started once, by whoever needs it."""

from collections.abc import Iterator

import pytest

from steward.testing.postgres import PgBouncer, PostgresServer


def _started() -> PostgresServer:
    try:
        server = PostgresServer()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    server.start()
    return server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    server = _started()
    yield server
    server.remove()


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server that the test may kill."""
    server = _started()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def pooler(postgres_server: PostgresServer) -> Iterator[PgBouncer]:
    try:
        pooler = PgBouncer(postgres_server)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    pooler.start()
    yield pooler
    pooler.remove()
