"""A node that knows it is over: nothing goes out of it any more, and what it saw is reported."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agent_service.core.effects import AnswerAttached
from agent_service.core.journal import Append, Committed
from agent_service.host import host as host_module
from agent_service.host.standstill import Standstill
from agent_service.log.memory import MemoryLog
from agent_service.log.port import Done, Operation
from steward.model.keys import Epoch, UserKey
from steward.model.violations import ViolationKind

ALICE = UserKey("default", "alice")
Until = Callable[..., Any]


class CountingLog(MemoryLog):
    """Counts appends."""

    appends = 0

    def submit(self, operations: Sequence[Operation], size: int, done: Done) -> None:
        self.appends += sum(isinstance(operation, Append) for operation in operations)
        super().submit(operations, size, done)


@pytest.mark.asyncio
async def test_after_a_fence_nothing_goes_out_any_more(make_node: Any, wait_until: Until) -> None:
    log = CountingLog()
    node = make_node(log)
    await node.attached(7)
    node.send(7, "m1", "x", "forever")
    await wait_until(lambda: "agent_thinking" in node.edge.types(), "it runs")
    events, appends = len(node.edge.events), log.appends
    node.host.fence("the registry says so")
    assert node.edge.aborted
    assert node.host.managers == 0
    assert node.edge.lost == [], "the end of the stream tells them"
    node.place(9, activate=True)
    node.attach(9)
    node.send(7, "m2", "more")
    await asyncio.sleep(0.1)
    assert (len(node.edge.events), log.appends) == (events, appends)
    assert node.registry.released == [], "its placements are the registry's affair"
    assert len(node.edge.of(AnswerAttached)) == 1
    assert node.host.fenced.result() == "the registry says so"


@pytest.mark.asyncio
async def test_who_stood_still_for_longer_than_its_lease_acts_on_nothing_that_waited(
    make_node: Any, wait_until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step after the pause notices, whichever it is: here the answer of the log."""
    log = CountingLog()
    node = make_node(log, lease_ms=1000)
    await node.attached(7)
    submitted: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(log, "submit", lambda _, __, done: submitted.set_result(done))
    node.send(7, "m1", "x")
    answer = await asyncio.wait_for(submitted, 2.0)
    now = host_module.boot_ms
    monkeypatch.setattr(host_module, "boot_ms", lambda: now() + 1500)
    answer([Committed(3)])
    await wait_until(lambda: node.host.fenced.done(), "it noticed")
    assert node.edge.events == []
    assert node.edge.aborted
    (report,) = node.registry.violations
    assert report.kind is ViolationKind.NODE_STOOD_STILL
    assert "managers=1" in report.evidence and "stood_ms=1" in report.evidence
    assert report.node == node.incarnation


@pytest.mark.asyncio
async def test_a_refused_append_is_reported_also_by_a_fenced_process(
    make_node: Any, wait_until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MemoryLog()
    old, new = make_node(log), make_node(log, "node-1")
    await old.attached(7)
    await new.attached(8)
    held: list[tuple[Append, Done]] = []
    monkeypatch.setattr(log, "submit", lambda appends, _, done: held.append((appends[0], done)))
    old.send(7, "m1", "zombie")
    await wait_until(lambda: bool(held), "sent")
    old.host.fence("over")
    append, done = held[0]
    done([log.state.append(append)])
    await wait_until(lambda: bool(old.registry.violations), "reported")
    (report,) = old.registry.violations
    assert (report.kind, report.user, report.epoch) == (ViolationKind.STALE_APPEND, ALICE, 7)
    assert "fence=8" in report.evidence and "stood_ms=" in report.evidence


def test_a_pause_is_too_long_only_beyond_the_lease_and_then_for_good() -> None:
    watch = Standstill(0)
    watch.allow(10_000, 5000)
    assert not watch.too_long(15_000)
    assert watch.sign(15_000)
    assert watch.recent_ms(15_100) == 5000
    assert watch.recent_ms(60_000) == 45_000
    assert watch.too_long(20_001)
    assert not watch.sign(20_002), "sticky"
    assert watch.too_long(20_003)
    assert watch.stood_ms == 5001


def test_nobody_stands_still_before_there_is_a_lease() -> None:
    watch = Standstill(0)
    assert not watch.too_long(1_000_000)
    watch.allow(1_000_000, 5000)
    assert watch.sign(1_000_100)
    assert watch.recent_ms(1_000_200) == 0
    assert Epoch(0) == 0
