"""Open runs without a manager: who names them, when, and how fast."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agent_service.core.journal import Append, Committed, Record, RecordKind, Seal, Sealed
from agent_service.host.log_head import LogHead
from agent_service.host.orphans import OrphanScan
from agent_service.log.memory import LogState, MemoryLog
from agent_service.log.port import LogFailed, LogSummary, OpenRunPage
from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, NodeId, StreamId, UserKey
from steward.model.keys import Sequence as SequenceNumber
from steward.model.rendezvous import favourite
from steward.testing.waiting import eventually

pytestmark = pytest.mark.asyncio
N1, N2, N3 = NodeId("n1"), NodeId("n2"), NodeId("n3")
NEVER_S = 1000.0


def user(number: int) -> UserKey:
    return UserKey("t", f"u{number}")


class CountingLog(MemoryLog):
    """A log in memory with open runs for `users`, that can be away or broken."""

    def __init__(self, users: int) -> None:
        state = LogState(lambda: StreamId("s"))
        for number in range(users):
            assert isinstance(state.seal(Seal(user(number), Epoch(1), "a")), Sealed)
            records = (Record(RecordKind.RUN, "r1", b"{}"),)
            append = Append(user(number), Epoch(1), 1, SequenceNumber(1), (), records)
            assert isinstance(state.append(append), Committed)
        super().__init__(state)
        self.pages: list[UserKey | None] = []
        self.error: Exception | None = None

    async def open_runs(self, after: UserKey | None, limit: int) -> OpenRunPage:
        self.pages.append(after)
        if self.error is not None:
            raise self.error
        return await super().open_runs(after, limit)

    async def describe(self) -> LogSummary:
        self.pages.append(None)
        if self.error is not None:
            raise self.error
        return await super().describe()


class Node:
    """A scan with what it works on; `named` are the users whom it named, in order."""

    def __init__(self, log: CountingLog, node_id: NodeId = N1, every_s: float = NEVER_S) -> None:
        self.here: list[UserKey] = []
        self.named: list[UserKey] = []
        self.registry_is_there = True
        self.scan = OrphanScan(
            log,
            node_id,
            lambda: [(user, Epoch(1)) for user in self.here],
            self._adopt,
            page_users=10,
            page_pause_s=0.001,
            every_s=every_s,
        )

    def _adopt(self, users: Sequence[UserKey]) -> bool:
        if self.registry_is_there:
            self.named.extend(users)
        return self.registry_is_there


class Running:
    """Runs coroutines as tasks for the length of a `with`."""

    def __init__(self, *runs: Callable[[], Any]) -> None:
        self._runs = runs

    async def __aenter__(self) -> list["asyncio.Task[Any]"]:
        self.tasks = [asyncio.create_task(run()) for run in self._runs]
        return self.tasks

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)


async def turns(count: int = 50) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_the_nodes_share_all_open_runs_and_each_is_named_once() -> None:
    log = CountingLog(60)
    nodes = [Node(log, node_id) for node_id in (N1, N2, N3)]
    async with Running(*(node.scan.run for node in nodes)):
        for node in nodes:
            node.scan.members([N3, N1, N2])
        await eventually(lambda: sum(len(node.named) for node in nodes) >= 60, "all are named")
        await turns()
    named = [who for node in nodes for who in node.named]
    assert sorted(named) == sorted(user(number) for number in range(60))
    for node, node_id in zip(nodes, (N1, N2, N3), strict=True):
        assert node.named
        assert all(favourite(who, (N1, N2, N3)) == node_id for who in node.named)


async def test_nobody_is_named_before_the_members_are_known() -> None:
    log = CountingLog(5)
    node = Node(log, every_s=0.001)
    async with Running(node.scan.run):
        await turns()
        assert log.pages == []
        node.scan.members([N1])
        await eventually(lambda: len(node.named) >= 5, "all are named")


async def test_a_user_with_a_manager_here_is_never_named() -> None:
    log = CountingLog(25)
    node = Node(log)
    node.here = [user(number) for number in range(0, 25, 2)]
    async with Running(node.scan.run):
        node.scan.members([N1])
        await eventually(lambda: len(log.pages) == 3, "the scan is through")
        await turns()
    assert node.named == [user(number) for number in range(1, 25, 2)]


async def test_when_a_node_is_gone_its_share_is_named_by_those_that_are_left() -> None:
    log = CountingLog(40)
    node = Node(log)
    async with Running(node.scan.run):
        node.scan.members([N1, N2])
        await eventually(lambda: len(log.pages) == 4, "the first scan is through")
        await turns()
        first = set(node.named)
        assert 0 < len(first) < 40
        node.here = list(first)
        node.named.clear()
        node.scan.members([N1])
        await eventually(lambda: len(log.pages) == 8, "the second scan is through")
        await turns()
    assert set(node.named) == {user(number) for number in range(40)} - first


async def test_the_same_members_again_begin_no_scan() -> None:
    log = CountingLog(5)
    node = Node(log)
    async with Running(node.scan.run):
        node.scan.members([N1, N2])
        await eventually(lambda: len(log.pages) == 1, "the scan is through")
        node.scan.members([N2, N1])
        await turns()
    assert len(log.pages) == 1


async def test_a_node_that_takes_no_users_has_no_share() -> None:
    log = CountingLog(5)
    node = Node(log, every_s=0.001)
    async with Running(node.scan.run):
        node.scan.members([N2, N3])
        await asyncio.sleep(0.02)
    assert log.pages == []


async def test_scans_come_again_by_themselves() -> None:
    log = CountingLog(3)
    node = Node(log, every_s=0.01)
    async with Running(node.scan.run):
        node.scan.members([N1])
        await eventually(lambda: len(node.named) >= 9, "three scans")
    assert node.named[:3] == node.named[3:6] == [user(0), user(1), user(2)]


async def test_a_log_or_registry_that_is_away_only_delays_a_scan() -> None:
    log = CountingLog(3)
    node = Node(log, every_s=0.01)
    log.error = StewardError(Reason.STORE_UNAVAILABLE, "away")
    async with Running(node.scan.run):
        node.scan.members([N1])
        await eventually(lambda: len(log.pages) >= 2, "it tries again")
        log.error, node.registry_is_there = None, False
        tried = len(log.pages)
        await eventually(lambda: len(log.pages) >= tried + 2, "it tries again")
        assert node.named == []
        node.registry_is_there = True
        await eventually(lambda: len(node.named) >= 3, "all are named")


async def test_a_log_that_failed_for_good_ends_the_scan_and_the_answering() -> None:
    log = CountingLog(3)
    log.error = LogFailed("disk")
    node = Node(log)
    head = LogHead(log, lambda _: None)
    async with Running(node.scan.run, head.run) as tasks:
        node.scan.members([N1])
        head.asked()
        await eventually(lambda: all(task.done() for task in tasks), "both end")
        assert all(isinstance(task.exception(), LogFailed) for task in tasks)


async def test_pages_are_paced() -> None:
    log = CountingLog(100)
    node = Node(log)
    node.scan._page_pause_s = NEVER_S
    async with Running(node.scan.run):
        node.scan.members([N1])
        await eventually(lambda: len(node.named) == 10, "the first page is named")
        await turns()
        assert len(log.pages) == 1


async def test_the_registry_gets_the_largest_fence_when_it_asks() -> None:
    log = CountingLog(3)
    log.state.seal(Seal(user(1), Epoch(77), "b"))
    told: list[Epoch] = []
    head = LogHead(log, told.append)
    async with Running(head.run):
        await turns()
        assert told == []
        head.asked()
        head.asked()
        await eventually(lambda: told, "the answer")
        await turns()
        assert told == [77]
        head.asked()
        await eventually(lambda: told == [77, 77], "the second answer")


async def test_a_question_waits_for_a_log_that_is_away() -> None:
    log = CountingLog(1)
    log.error = StewardError(Reason.STORE_UNAVAILABLE, "away")
    told: list[Epoch] = []
    head = LogHead(log, told.append)
    async with Running(head.run):
        head.asked()
        await eventually(lambda: len(log.pages) >= 2, "it tries again")
        assert told == []
        log.error = None
        await eventually(lambda: told == [1], "the answer")
