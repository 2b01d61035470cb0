"""Three logs behind one port: in memory, SQLite in this process, and a real log process."""

import importlib.util
import sys
from collections.abc import AsyncIterator
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
from agent_service.log.remote import RemoteLog  # noqa: E402
from agent_service.log.sqlite import SqliteLog  # noqa: E402
from steward.model.keys import NodeId  # noqa: E402
from steward.rpc.keys import CONTROL_KEY, load_or_create_key  # noqa: E402
from steward.rpc.roles import Role, RoleCredentials  # noqa: E402
from steward.telemetry.catalog import LogMetrics  # noqa: E402


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


RIGS = {"memory": MemoryRig, "sqlite": SqliteRig, "remote": RemoteRig}


@pytest_asyncio.fixture(params=RIGS)
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    rig: Rig = RIGS[request.param](tmp_path)
    await rig.start()
    yield rig
    await rig.stop()


@pytest_asyncio.fixture
async def remote_rig(tmp_path: Path) -> AsyncIterator[RemoteRig]:
    rig = RemoteRig(tmp_path)
    await rig.start()
    yield rig
    await rig.stop()
