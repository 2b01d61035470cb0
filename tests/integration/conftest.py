"""Real servers that several parts are tested with; each is started once, by whoever needs it.

And `caplog`, which shows lines as a terminal would: with their fields.
"""

from collections.abc import Iterator

import pytest

from steward.telemetry.logs import TextLines
from steward.testing.postgres import PgBouncer, PostgresServer


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The message alone would be a constant."""
    caplog.handler.setFormatter(TextLines("test", "test"))
    return caplog


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
