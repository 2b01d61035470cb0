"""The supervisor with real processes that are small: restart, order of the stop, failed starts."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from steward.cli.ports import PortReservations
from steward.cli.process import Process
from steward.cli.supervisor import (
    Child,
    ChildState,
    Death,
    ProcessSpec,
    StartFailed,
    Supervisor,
)

STANDIN = Path(__file__).with_name("standin.py")
DEADLINE_S = 15.0


@pytest.fixture
def ports() -> Iterator[PortReservations]:
    reservations = PortReservations()
    yield reservations
    reservations.close()


class Cast:
    """Stand-ins to be supervised, and what the supervisor told about them."""

    def __init__(self, folder: Path, ports: PortReservations) -> None:
        self.folder = folder
        self.stops = folder / "stops"
        self.deaths: list[Death] = []
        self.ready: list[str] = []
        self._ports = ports

    def spec(self, role: str, name: str, mode: str) -> ProcessSpec:
        port = self._ports.reserve()
        command = (sys.executable, str(STANDIN), str(port), mode, str(self.stops))
        log = self.folder / f"{name}.log"
        return ProcessSpec(role, name, command, None, None, f"127.0.0.1:{port}", log)

    @asynccontextmanager
    async def supervised(
        self, *specs: ProcessSpec, stop_by_s: dict[str, float] | None = None
    ) -> AsyncIterator[Supervisor]:
        supervisor = Supervisor(
            specs,
            os.environ,
            on_ready=lambda child: self.ready.append(child.spec.id),
            on_death=self.deaths.append,
            stop_by_s=stop_by_s or {"edge": 3.0, "agent": 6.0},
        )
        supervisor.start()
        try:
            yield supervisor
        finally:
            supervisor.kill()
            await supervisor.stop()


@pytest.fixture
def cast(tmp_path: Path, ports: PortReservations) -> Cast:
    return Cast(tmp_path, ports)


async def eventually(condition: Callable[[], bool]) -> bool:
    """Poll until the condition holds; False after the deadline."""
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        if condition():
            return True
        await asyncio.sleep(0.01)
    return False


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.asyncio
async def test_all_processes_are_ready_before_the_start_is_over(cast: Cast) -> None:
    specs = [cast.spec("agent", f"node-{i}", "ready") for i in range(2)]
    async with cast.supervised(*specs) as supervisor:
        await asyncio.wait_for(supervisor.wait_ready(), DEADLINE_S)
        assert sorted(cast.ready) == ["node-0", "node-1"]
        assert supervisor.unready() == []


@pytest.mark.asyncio
async def test_an_unready_process_says_what_it_waits_for(cast: Cast) -> None:
    async with cast.supervised(cast.spec("agent", "node-0", "unready")) as supervisor:
        assert await eventually(lambda: supervisor.unready() == [("node-0", "no peer yet")])


@pytest.mark.asyncio
async def test_a_dead_process_starts_again_under_its_id_and_address(cast: Cast) -> None:
    async with cast.supervised(cast.spec("agent", "node-0", "ready")) as supervisor:
        await asyncio.wait_for(supervisor.wait_ready(), DEADLINE_S)
        child: Child = supervisor.children[0]
        first = child.pid
        os.kill(first, signal.SIGKILL)
        assert await eventually(lambda: cast.ready == ["node-0", "node-0"])
        assert child.pid != first
        assert child.restarts == 1
        assert [(d.pid, d.code, d.restart_in_s) for d in cast.deaths] == [
            (first, -signal.SIGKILL, 1.0)
        ]


@pytest.mark.asyncio
async def test_a_node_steps_back_at_its_start_only_while_another_one_serves(
    cast: Cast, monkeypatch: pytest.MonkeyPatch
) -> None:
    back: list[int] = []
    # What it does to the scheduler can't be seen on every kernel.
    monkeypatch.setattr(Process, "step_back", lambda process: back.append(process.pid))
    specs = [cast.spec("agent", f"node-{i}", "ready") for i in range(2)]
    async with cast.supervised(*specs) as supervisor:
        await asyncio.wait_for(supervisor.wait_ready(), DEADLINE_S)
        for child in supervisor.children:
            child.send(signal.SIGKILL)
        assert await eventually(lambda: len(cast.ready) == 4)
        assert back == []
        supervisor.children[0].send(signal.SIGKILL)
        assert await eventually(lambda: len(cast.ready) == 5)
        assert back == [supervisor.children[0].pid]


@pytest.mark.asyncio
async def test_wrong_use_ends_the_start_with_the_words_of_the_process(cast: Cast) -> None:
    specs = [cast.spec("edge", "edge-0", "ready"), cast.spec("agent", "node-0", "wrong-use")]
    async with cast.supervised(*specs) as supervisor:
        with pytest.raises(StartFailed) as failure:
            await asyncio.wait_for(supervisor.wait_ready(), DEADLINE_S)
    assert failure.value.code == 2
    assert failure.value.words == ("steward: the agent can't be loaded: no such file",)


@pytest.mark.asyncio
async def test_a_process_that_never_gets_ready_is_given_up_after_three_deaths(cast: Cast) -> None:
    async with cast.supervised(cast.spec("agent", "node-0", "crash")) as supervisor:
        with pytest.raises(StartFailed) as failure:
            await asyncio.wait_for(supervisor.wait_ready(), DEADLINE_S)
    assert failure.value.code == 1
    assert [death.restart_in_s for death in cast.deaths] == [1.0, 2.0, 4.0]
    assert failure.value.words == ("something broke",)


@pytest.mark.asyncio
async def test_roles_stop_one_after_the_other(cast: Cast) -> None:
    specs = [cast.spec("agent", "node-0", "ready"), cast.spec("edge", "edge-0", "ready")]
    async with cast.supervised(*specs) as supervisor:
        await asyncio.wait_for(supervisor.wait_ready(), DEADLINE_S)
        node, edge = (child.pid for child in supervisor.children)
        assert await supervisor.stop() == []
        assert cast.stops.read_text().split() == [str(edge), str(node)]
        assert {child.state for child in supervisor.children} == {ChildState.STOPPED}
    assert not is_running(node)
    assert not is_running(edge)


@pytest.mark.asyncio
async def test_a_process_that_is_deaf_to_sigterm_is_killed_in_time(cast: Cast) -> None:
    specs = [cast.spec("edge", "edge-0", "deaf"), cast.spec("agent", "node-0", "ready")]
    async with cast.supervised(*specs, stop_by_s={"edge": 0.5, "agent": 2.0}) as supervisor:
        await asyncio.wait_for(supervisor.wait_ready(), DEADLINE_S)
        began = time.monotonic()
        assert await supervisor.stop() == ["edge-0"]
        assert 0.5 <= time.monotonic() - began < 2.0
        assert str(supervisor.children[1].pid) in cast.stops.read_text().split()


@pytest.mark.asyncio
async def test_kill_ends_a_stop_that_waits(cast: Cast) -> None:
    async with cast.supervised(
        cast.spec("edge", "edge-0", "deaf"), stop_by_s={"edge": 60.0}
    ) as supervisor:
        await asyncio.wait_for(supervisor.wait_ready(), DEADLINE_S)
        stopping = asyncio.create_task(supervisor.stop())
        assert await eventually(cast.stops.exists)
        supervisor.kill()
        await asyncio.wait_for(stopping, 5.0)
        assert not is_running(supervisor.children[0].pid)


@pytest.mark.asyncio
async def test_nothing_is_started_again_after_the_stop_began(cast: Cast) -> None:
    async with cast.supervised(cast.spec("agent", "node-0", "ready")) as supervisor:
        await asyncio.wait_for(supervisor.wait_ready(), DEADLINE_S)
        os.kill(supervisor.children[0].pid, signal.SIGKILL)
        assert await eventually(lambda: supervisor.children[0].state is ChildState.WAITING)
        await asyncio.wait_for(supervisor.stop(), 0.9)
        assert supervisor.children[0].starts == 1
