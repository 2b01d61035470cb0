"""Appends of many managers travel together, and one manager's trouble stays its own."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from agent_service.core.commands import Command, FinishAppend
from agent_service.core.effects import WriteAppend
from agent_service.core.journal import Append, Committed
from agent_service.core.manager import Manager
from agent_service.host.appends import Appends
from agent_service.host.turn import Turn
from agent_service.log.port import Done, EventLog, Operation
from steward.model.keys import Epoch, UserKey
from steward.model.keys import Sequence as Number
from steward.telemetry.catalog import AgentMetrics

pytestmark = pytest.mark.asyncio


class Log:
    """Keeps what was submitted until it is answered."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, Done]] = []

    def submit(self, operations: Sequence[Operation], size: int, done: Done) -> None:
        self.waiting.append((len(operations), done))

    def commit(self) -> None:
        number, done = self.waiting.pop()
        done([Committed(Number(2))] * number)


class Rig:
    """Three managers, by name, of which one stumbles over every outcome."""

    def __init__(self) -> None:
        self.log = Log()
        self.turn = Turn(lambda: False)
        self.told: list[str] = []
        self.appends = Appends(
            cast(EventLog, self.log),
            AgentMetrics(CollectorRegistry()),
            self.turn,
            lambda: False,
            self._tell,
            cast(Any, None),
            cast(Any, None),
        )

    def write(self, *names: str) -> None:
        with self.turn:
            for name in names:
                append = Append(UserKey("default", name), Epoch(1), 1, Number(1), (), ())
                self.appends.write(cast(Manager, name), WriteAppend(append, ()))

    def _tell(self, live: Manager, command: Command) -> None:
        assert isinstance(command, FinishAppend)
        if str(live) == "bob":
            raise RuntimeError("an error of this process")
        self.told.append(str(live))


async def test_an_error_in_the_step_of_one_user_costs_no_other_one_an_outcome(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig()
    rig.write("alice", "bob", "carol")
    rig.log.commit()
    assert rig.told == ["alice", "carol"]
    assert "an error of this process" in caplog.text
