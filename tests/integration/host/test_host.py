"""Rules of the host: real managers, the real in-memory log, the real agent loop; peers by hand."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agent_service.core.commands import (
    ApplyVerbs,
    AttachEdge,
    CancelRun,
    DetachEdge,
    FinishAppend,
    SubmitMessage,
)
from agent_service.core.effects import AnswerAccepted, AnswerAttached, AnswerRefused
from agent_service.core.journal import Append, Seal, SealOutcome
from agent_service.core.manager import Manager
from agent_service.log.memory import MemoryLog
from agent_service.log.port import Done, EventPage, LogFailed, Operation, ReadRange
from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, RunId, ThreadId, UserKey
from steward.model.placement import Placement

ALICE = UserKey("default", "alice")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    """Wait for a condition with a deadline."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.005)


@pytest.mark.asyncio
async def test_a_message_runs_the_agent_and_its_events_reach_the_edge_in_order(node: Any) -> None:
    node.place(7)
    node.attach(7)
    await until(lambda: bool(node.edge.of(AnswerAttached)), "attached")
    node.send(7, "m1", "one two")
    await until(lambda: "agent_completed" in node.edge.types(), "completed")
    assert [event["sequence"] for event in node.edge.events] == list(
        range(1, len(node.edge.events) + 1)
    )
    assert node.edge.types()[:3] == ["user_message", "agent_started", "agent_thinking"]
    assert node.edge.events[-1]["data"]["response"] == "one two "
    assert len(node.edge.of(AnswerAccepted)) == 1


@pytest.mark.asyncio
async def test_an_agent_sees_its_threads_history_and_the_input_last(node: Any) -> None:
    node.place(7)
    node.attach(7)
    node_messages = [("m1", "first"), ("m2", "second")]
    await until(lambda: bool(node.edge.of(AnswerAttached)), "attached")
    for id, text in node_messages:
        node.send(7, id, text, "echo")
    node.send(7, "m3", "third", "history")
    await until(lambda: node.edge.types().count("agent_completed") == 3, "three runs")
    assert node.edge.events[-1]["data"]["response"] == (
        "user:first | assistant:first  | user:second | assistant:second  | user:third"
    )


@pytest.mark.asyncio
async def test_a_grant_that_was_not_pushed_yet_is_asked_for_once(node: Any) -> None:
    node.place(7, push=False)
    node.attach(7)
    await until(lambda: bool(node.edge.of(AnswerAttached)), "attached")
    assert node.registry.asked == [ALICE]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("granted", "tried", "kind"),
    [(None, 7, "unknown_placement"), (8, 7, "stale_epoch"), (7, 8, "forged_epoch")],
)
async def test_a_placement_that_was_not_granted_makes_no_manager(
    node: Any, granted: int | None, tried: int, kind: str
) -> None:
    if granted is not None:
        node.place(granted)
    node.attach(tried)
    await until(lambda: bool(node.edge.of(AnswerRefused)), "refused")
    assert node.host.managers == 0
    assert node.registry.refusals == [(kind, tried)]


@pytest.mark.asyncio
async def test_a_placement_of_another_node_makes_no_manager(node: Any) -> None:
    node.place(7, node=NodeIncarnation(NodeId("node-1"), NodeRev(4)))
    node.attach(7)
    await until(lambda: bool(node.edge.of(AnswerRefused)), "refused")
    assert node.host.managers == 0


@pytest.mark.asyncio
async def test_a_command_of_a_stale_epoch_is_refused_and_reported(node: Any) -> None:
    node.place(7)
    node.attach(7)
    await until(lambda: bool(node.edge.of(AnswerAttached)), "attached")
    node.send(6, "m1", "hello")
    refused, known = node.edge.answers[-1]
    assert isinstance(refused, AnswerRefused) and refused.reason is Reason.EPOCH_STALE
    assert known == 7
    assert ("stale_epoch_command", 6) in node.registry.refusals


@pytest.mark.asyncio
@pytest.mark.parametrize("step", [SubmitMessage, ApplyVerbs, FinishAppend])
async def test_a_manager_that_stumbles_is_ended_and_its_neighbours_go_on(
    node: Any, step: type, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bob = UserKey("default", "bob")
    await node.attached(7)
    node.registry.placed[bob] = Placement(bob, Epoch(8), *node.incarnation, "a:1")
    node.host.granted([node.registry.placed[bob]], False)
    node.host.command(bob, Epoch(8), AttachEdge(node.edge.edge_id, 1, 0), TRACE)
    await until(lambda: len(node.edge.of(AnswerAttached)) == 2, "both are attached")
    handle = Manager.handle

    def stumble(live: Manager, now_ms: int, command: Any, wall_ms: int) -> Any:
        if live.user == ALICE and type(command) is step:
            raise RuntimeError("a fault")
        return handle(live, now_ms, command, wall_ms)

    monkeypatch.setattr(Manager, "handle", stumble)
    node.send(7, "m1", "hello")
    message = SubmitMessage(
        node.edge.edge_id, 3, "m2", b'"good day"', ThreadId("main"), "echo", "", TRACE
    )
    node.host.command(bob, Epoch(8), message, TRACE)
    await until(lambda: "agent_completed" in node.edge.types(), "the neighbour's run is over")
    await until(lambda: node.edge.lost == [(Reason.MANAGER_MOVED, 0)], "the edge is told")
    assert node.registry.released == [(ALICE, 7, "stumbled over an error")]
    assert "a manager stumbled and is ended" in caplog.text
    assert not node.host.failed.done()
    monkeypatch.undo()
    await node.attached(9)


@pytest.mark.asyncio
async def test_a_higher_grant_ends_the_manager_and_it_is_never_made_again_under_its_epoch(
    node: Any,
) -> None:
    node.place(7)
    node.attach(7)
    await until(lambda: bool(node.edge.of(AnswerAttached)), "attached")
    node.place(9)
    assert node.edge.lost == [(Reason.EPOCH_STALE, 9)]
    assert (ALICE, 7, "fenced") in node.registry.released
    node.attach(7)
    await until(lambda: bool(node.edge.of(AnswerRefused)), "refused")
    assert node.host.managers == 0
    node.attach(9)
    await until(lambda: len(node.edge.of(AnswerAttached)) == 2, "attached under 9")


class FirstSealWaits(MemoryLog):
    """Answers the first seal only when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = asyncio.Event()
        self.seals = 0

    async def seal(self, seal: Seal) -> SealOutcome:
        self.seals += 1
        if self.seals == 1:
            await self.let.wait()
        return await super().seal(seal)


@pytest.mark.asyncio
async def test_a_higher_epoch_is_taken_while_a_lower_one_is_still_being_made(
    make_node: Any,
) -> None:
    log = FirstSealWaits()
    node = make_node(log)
    node.place(7)
    node.attach(7)
    await until(lambda: log.seals == 1, "the first seal is on its way")
    await node.attached(9)
    log.let.set()
    await until(lambda: bool(node.edge.of(AnswerRefused)), "the lower one is refused")
    node.send(9, "m1", "hello")
    await until(lambda: "agent_completed" in node.edge.types(), "the higher one serves")
    assert {event["epoch"] for event in node.edge.events} == {9}


@pytest.mark.asyncio
async def test_two_nodes_on_one_log_the_older_is_fenced_and_shows_nothing(make_node: Any) -> None:
    log = MemoryLog()
    old, new = make_node(log), make_node(log, "node-1")
    await old.attached(7)
    await new.attached(8)
    old.send(7, "m1", "zombie")
    await until(lambda: bool(old.edge.lost), "the old one is over")
    assert old.edge.events == []
    assert ("stale_append", 7) in old.registry.refusals
    new.send(8, "m1", "alive")
    await until(lambda: "agent_completed" in new.edge.types(), "the new one runs")
    assert all(event["epoch"] == 8 for event in new.edge.events)


@pytest.mark.asyncio
async def test_cancel_ends_a_run_that_never_would(node: Any) -> None:
    node.place(7)
    node.attach(7)
    await until(lambda: bool(node.edge.of(AnswerAttached)), "attached")
    node.send(7, "m1", "x", "forever")
    await until(lambda: "agent_thinking" in node.edge.types(), "it runs")
    cancel = CancelRun(node.edge.edge_id, 3, RunId(""), ThreadId("main"))
    node.host.command(ALICE, Epoch(7), cancel, TRACE)
    await until(lambda: "agent_completed" in node.edge.types(), "cancelled")
    assert node.edge.events[-1]["data"]["outcome"] == "cancelled"


@pytest.mark.asyncio
async def test_an_agent_that_blocks_does_not_stop_the_host(node: Any) -> None:
    node.place(7)
    node.attach(7)
    await until(lambda: bool(node.edge.of(AnswerAttached)), "attached")
    node.send(7, "m1", "x", "block")
    await until(lambda: "agent_started" in node.edge.types(), "it runs")
    started = asyncio.get_running_loop().time()
    second = SubmitMessage(node.edge.edge_id, 9, "m2", b'"y"', ThreadId("side"), "echo", "", TRACE)
    node.host.command(ALICE, Epoch(7), second, TRACE)
    await until(lambda: len(node.edge.of(AnswerAccepted)) == 2, "the second is accepted")
    assert "agent_completed" not in node.edge.types()
    await until(lambda: node.edge.types().count("agent_completed") == 2, "both end")
    assert asyncio.get_running_loop().time() > started


@pytest.mark.asyncio
async def test_a_stop_lets_runs_end_and_gives_every_placement_back(node: Any) -> None:
    node.place(7)
    node.attach(7)
    await until(lambda: bool(node.edge.of(AnswerAttached)), "attached")
    node.send(7, "m1", "one two three")
    await node.host.drain(runs_s=5.0, appends_s=2.0)
    assert node.host.managers == 0
    assert node.edge.types()[-1] == "agent_completed"
    assert (ALICE, 7, "stopped") in node.registry.released
    node.attach(7)
    await until(lambda: bool(node.edge.of(AnswerRefused)), "refused while draining")


@pytest.mark.asyncio
async def test_a_manager_that_nobody_needs_is_put_away_and_comes_back_under_a_new_epoch(
    node: Any,
) -> None:
    node.host.passivate_after(100)
    node.place(7)
    node.attach(7)
    await until(lambda: bool(node.edge.of(AnswerAttached)), "attached")
    node.send(7, "m1", "one")
    await until(lambda: "agent_completed" in node.edge.types(), "completed")
    await asyncio.sleep(0.8)
    assert node.host.managers == 1, "somebody is attached"
    node.host.command(ALICE, Epoch(7), DetachEdge(node.edge.edge_id), TRACE)
    await until(lambda: node.host.managers == 0, "put away")
    assert node.registry.released == [(ALICE, 7, "passivated")]
    node.place(8)
    node.attach(8)
    await until(lambda: len(node.edge.of(AnswerAttached)) == 2, "attached again")
    node.send(8, "m2", "two")
    await until(lambda: node.edge.types().count("agent_completed") == 2, "completed again")
    assert "manager_moved" not in node.edge.types()


@pytest.mark.asyncio
async def test_a_run_without_anybody_attached_keeps_its_manager(node: Any) -> None:
    node.host.passivate_after(100)
    node.place(7)
    node.attach(7)
    await until(lambda: bool(node.edge.of(AnswerAttached)), "attached")
    node.send(7, "m1", "x", "block")
    await until(lambda: "agent_started" in node.edge.types(), "it runs")
    node.host.edge_closed(node.edge.edge_id)
    await until(lambda: node.host.managers == 0, "put away after the run", 10)
    node.host.edge_opened(node.edge)
    node.place(8)
    node.attach(8)
    await until(lambda: len(node.edge.of(AnswerAttached)) == 2, "attached again")
    assert node.edge.of(AnswerAttached)[1].sequence == 4, "the run ended before"


class UnreadableLog(MemoryLog):
    """A log that can't be read for a while: appends go on."""

    failures = 2

    async def read(self, user: UserKey, wanted: ReadRange) -> EventPage:
        if self.failures:
            self.failures -= 1
            raise StewardError(Reason.STORE_UNAVAILABLE, "the event log can't be read")
        return await super().read(user, wanted)


@pytest.mark.asyncio
async def test_a_log_that_is_away_delays_a_run_and_never_ends_the_node(make_node: Any) -> None:
    node = make_node(UnreadableLog())
    await node.attached(7)
    node.send(7, "m1", "one")
    await until(lambda: "agent_completed" in node.edge.types(), "completed")
    assert node.edge.events[-1]["data"]["outcome"] == "success"
    assert not node.host.failed.done()


class BrokenLog(MemoryLog):
    """A log whose disk fails for good at the first append."""

    def submit(self, operations: Sequence[Operation], size: int, done: Done) -> None:
        if not isinstance(operations[0], Append):
            super().submit(operations, size, done)
            return
        asyncio.get_running_loop().call_soon(done, LogFailed("disk I/O error"))


@pytest.mark.asyncio
async def test_a_log_that_failed_for_good_ends_the_node(make_node: Any) -> None:
    node = make_node(BrokenLog())
    await node.attached(7)
    node.send(7, "m1", "x")
    assert "disk I/O error" in await asyncio.wait_for(node.host.failed, 2.0)
    assert node.edge.of(AnswerAccepted) == []
    assert node.edge.events == []
