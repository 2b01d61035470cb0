"""Logs behind one port: in memory, SQLite in this process, a log process, and PostgreSQL."""

import importlib.util
import sys
from collections.abc import AsyncIterator, Callable
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
from steward.testing.postgres import PgBouncer, PostgresServer  # noqa: E402


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
        # A clock that notes each group, so that tests need not wait for it.
        log = SqliteLog(self._data, LogMetrics(CollectorRegistry()), clock_ms=0)
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


EMPTY = (
    "DELETE FROM steward.chunk; DELETE FROM steward.record; DELETE FROM steward.thread;"
    "DELETE FROM steward.stream; UPDATE steward.total SET streams = 0, events = 0"
)


class PostgresRig:
    """With `pooler`, through PgBouncer in transaction mode."""

    def __init__(
        self, server: PostgresServer, migrated: list[str], pooler: PgBouncer | None = None
    ) -> None:
        self.server = server
        self.migrated = migrated
        self.pooler = pooler
        self.database = ""

    async def start(self) -> None:
        if not self.migrated:
            self.migrated.append(await self.server.make_database())
        self.database = self.migrated[0]
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
        await self.server.execute(EMPTY, self.database)


RIGS = {"memory": MemoryRig, "sqlite": SqliteRig, "remote": RemoteRig}


@pytest.fixture(scope="session")
def migrated() -> list[str]:
    """The one database of all tests with a rig, once there is one; each empties it again."""
    return []


@pytest.fixture
def engine_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Rig]:
    """Makes the rig of a name; servers are started for those that need them."""

    def make(name: str) -> Rig:
        if name in RIGS:
            return RIGS[name](tmp_path)
        server = request.getfixturevalue("postgres_server")
        pooler = request.getfixturevalue("pooler") if name == "pgbouncer" else None
        return PostgresRig(server, request.getfixturevalue("migrated"), pooler)

    return make


@pytest_asyncio.fixture(params=[*RIGS, "postgres", "pgbouncer"])
async def rig(request: pytest.FixtureRequest, engine_rig) -> AsyncIterator[Rig]:
    rig: Rig = engine_rig(request.param)
    await rig.start()
    yield rig
    await rig.stop()


@pytest_asyncio.fixture
async def remote_rig(tmp_path: Path) -> AsyncIterator[RemoteRig]:
    rig = RemoteRig(tmp_path)
    await rig.start()
    yield rig
    await rig.stop()
