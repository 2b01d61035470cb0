"""A manager that leaves by plan: what it still does, what it holds back, and how it ends."""

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from agent_service.core.commands import (
    AnnounceClient,
    ApplyVerbs,
    AttachEdge,
    CancelRun,
    Evict,
    FinishAppend,
    HandOff,
    Release,
    SubmitMessage,
)
from agent_service.core.effects import (
    AcknowledgeVerbs,
    AnswerAccepted,
    AnswerAttached,
    AnswerCancelled,
    AnswerRefused,
    Effect,
    EndManager,
    StartRun,
    StopRun,
    TellClientTaken,
    WriteAppend,
)
from agent_service.core.manager import Manager
from steward.client.checks import check_stream
from steward.errors import Reason
from steward.model.keys import EdgeId, ThreadId
from steward.model.verbs import EventType, RecordStep, RunKey

EDGE = EdgeId("edge-0#1")
OTHER = EdgeId("edge-1#1")
LATER_MS = 10**9
Message = Callable[..., SubmitMessage]


def of_kind(effects: list[Effect], kind: type) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def only(effects: list[Effect], kind: type) -> Any:
    found = of_kind(effects, kind)
    assert len(found) == 1, f"{len(found)} of {kind.__name__} in {effects}"
    return found[0]


def call(id: str) -> dict[str, Any]:
    return {"tool_call_id": id, "tool_name": "query", "arguments": {}}


def completion(id: str) -> dict[str, Any]:
    return {
        "tool_call_id": id,
        "tool_name": "query",
        "success": True,
        "result": 1,
        "duration_ms": 1,
    }


@pytest.fixture
def in_call(world: Any, message: Message, verb: Any) -> tuple[Manager, RunKey]:
    """A manager with an edge, and a run that waits for a tool."""
    manager = world.manager(5)
    world.step(manager, AttachEdge(EDGE, 1, 0))
    key = only(world.step(manager, message("m1")), StartRun).key
    world.step(manager, ApplyVerbs((verb(key, 1, EventType.TOOL_EXECUTING, call("c1")),)))
    return manager, key


def test_a_manager_without_runs_leaves_at_once(world: Any) -> None:
    manager = world.manager(5)
    ended = only(world.step(manager, HandOff("drain", LATER_MS)), EndManager)
    assert (ended.handoff, ended.activate, ended.cause) == (True, False, "drain")
    assert ended.reason is Reason.MANAGER_MOVED
    assert world.events() == []


def test_an_open_call_holds_the_move_and_its_end_lets_it_go(
    world: Any, in_call: tuple[Manager, RunKey], verb: Any
) -> None:
    manager, key = in_call
    assert world.step(manager, HandOff("move", LATER_MS)) == []
    assert manager.next_deadline() == LATER_MS
    done = verb(key, 2, EventType.TOOL_COMPLETED, completion("c1"))
    effects = world.step(manager, ApplyVerbs((done,)))
    assert only(effects, StopRun).key == key
    assert only(effects, EndManager).activate
    assert world.events()[-1]["type"] == "tool_completed"
    assert manager.next_deadline() is None


def test_at_the_bound_an_open_call_is_left_to_the_next_manager(
    world: Any, in_call: tuple[Manager, RunKey]
) -> None:
    manager, _ = in_call
    until_ms = world.now_ms + 100
    assert world.step(manager, HandOff("move", until_ms)) == []
    world.now_ms = until_ms
    assert only(world.step(manager, HandOff("move", until_ms)), EndManager).handoff
    assert "tool_completed" not in [event["type"] for event in world.events()]


def test_the_earliest_bound_counts_and_a_move_before_a_stop(
    world: Any, in_call: tuple[Manager, RunKey]
) -> None:
    manager, _ = in_call
    world.step(manager, Release("stopped", LATER_MS))
    world.step(manager, HandOff("move", LATER_MS + 5))
    assert manager.next_deadline() == LATER_MS
    assert only(world.step(manager, Release("stopped", 0)), EndManager).handoff


def test_messages_are_accepted_while_a_call_ends_and_run_on_the_next_node(
    world: Any, message: Message, verb: Any, in_call: tuple[Manager, RunKey]
) -> None:
    manager, key = in_call
    world.step(manager, HandOff("move", LATER_MS))
    effects = world.step(manager, message("m2", thread="side"))
    accepted = only(effects, AnswerAccepted)
    assert (accepted.queue_position, of_kind(effects, StartRun)) == (1, [])
    assert only(world.step(manager, AttachEdge(OTHER, 2, 0)), AnswerAttached)
    done = verb(key, 2, EventType.TOOL_COMPLETED, completion("c1"))
    world.step(manager, ApplyVerbs((done,)))
    world.effects.clear()
    world.manager(6, node="node-1")
    assert accepted.run_id in [start.key.run_id for start in of_kind(world.effects, StartRun)]


def test_while_the_last_record_is_on_its_way_nothing_is_taken_and_who_comes_is_told(
    world: Any, message: Message
) -> None:
    """What an attached edge sends it keeps: it hears of the end, and sends it to the next one."""
    manager = world.manager(5)
    world.step(manager, message("m1"))
    sent = manager.handle(0, HandOff("move"), world.wall_ms)
    append = only(sent, WriteAppend).append
    assert manager.handle(0, message("m2"), world.wall_ms) == []
    refused = only(manager.handle(0, AttachEdge(OTHER, 7, 0), world.wall_ms), AnswerRefused)
    assert (refused.edge_id, refused.reason) == (OTHER, Reason.MANAGER_MOVED)
    outcome = world.log.append(append)
    released = manager.handle(0, FinishAppend(append.append_number, outcome), world.wall_ms)
    assert only(released, EndManager).handoff
    assert manager.edges == ()
    assert not only(world.step(world.manager(6), message("m2")), AnswerAccepted).duplicate


@pytest.mark.parametrize("salvaged", ["call", "step"])
def test_no_tool_begins_and_results_behind_it_are_kept(
    world: Any, verb: Any, in_call: tuple[Manager, RunKey], salvaged: str
) -> None:
    """A branch wants another tool while the first call is open: it never hears that it may."""
    manager, key = in_call
    world.step(manager, HandOff("move", LATER_MS))
    held = verb(key, 2, EventType.TOOL_EXECUTING, call("c2"))
    text = verb(key, 3, EventType.AGENT_TEXT, {"message_id": "m", "delta": "x"})
    effects = world.step(manager, ApplyVerbs((held, text)))
    if salvaged == "step":
        effects += world.step(manager, ApplyVerbs((RecordStep(key, 4, "send.1", b"1"),)))
    done = verb(key, 5, EventType.TOOL_COMPLETED, completion("c1"))
    effects += world.step(manager, ApplyVerbs((done,)))
    assert of_kind(effects, AcknowledgeVerbs) == []
    assert only(effects, EndManager)
    events = world.events()
    assert [e["type"] for e in events[-2:]] == ["tool_executing", "tool_completed"]
    assert {e["data"]["tool_call_id"] for e in events[-2:]} == {"c1"}
    world.effects.clear()
    world.manager(6, node="node-1")
    expected = (("send.1", b"1"),) if salvaged == "step" else ()
    assert only(world.effects, StartRun).steps == expected


def test_a_run_that_is_still_prepared_is_stopped_after_its_start(
    world: Any, message: Message
) -> None:
    """The agent must not be called after it was stopped."""
    manager = world.manager(5)
    sent = manager.handle(0, message("m1"), world.wall_ms)
    assert manager.handle(0, HandOff("move", LATER_MS), world.wall_ms) == []
    effects = world.perform(manager, sent)
    kinds = [type(e) for e in effects if isinstance(e, StartRun | StopRun | EndManager)]
    assert kinds == [StartRun, StopRun, EndManager]


def test_an_evicted_user_has_every_run_cancelled_and_hears_why(
    world: Any, message: Message, in_call: tuple[Manager, RunKey]
) -> None:
    manager, _ = in_call
    for number, thread in enumerate(("main", "side", "side")):
        world.step(manager, message(f"w{number}", thread=thread))
    ended = only(world.step(manager, Evict("abuse")), EndManager)
    assert (ended.reason, ended.cause, ended.handoff) == (Reason.USER_EVICTED, "abuse", False)
    assert manager.over
    events = world.events()
    outcomes = [e["data"]["outcome"] for e in events if e["type"] == "agent_completed"]
    assert outcomes == ["cancelled"] * 4
    assert check_stream(events) == []
    world.effects.clear()
    world.manager(6, node="node-1")
    assert of_kind(world.effects, StartRun) == []
    assert world.events() == events, "an eviction is no move"


def test_a_cancel_is_heard_while_leaving(world: Any, in_call: tuple[Manager, RunKey]) -> None:
    manager, key = in_call
    world.step(manager, HandOff("move", LATER_MS))
    effects = world.step(manager, CancelRun(EDGE, 3, key.run_id, ThreadId("")))
    assert only(effects, AnswerCancelled).run_id == key.run_id
    assert not only(effects, EndManager).activate


def test_a_client_that_comes_to_another_edge_is_told_to_all_others(world: Any) -> None:
    manager = world.manager(5)
    for edge in (EDGE, OTHER):
        world.step(manager, AttachEdge(edge, 1, 0))
    told = world.step(manager, AnnounceClient(OTHER, "phone"))
    assert told == [TellClientTaken((EDGE,), "phone")]
    assert orjson.dumps(manager.snapshot()["leaving"]) == b"false"


def test_a_client_that_is_nowhere_else_is_told_to_nobody(world: Any) -> None:
    manager = world.manager(5)
    world.step(manager, AttachEdge(EDGE, 1, 0))
    assert world.step(manager, AnnounceClient(EDGE, "phone")) == []
