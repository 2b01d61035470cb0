"""Runs that go on under another manager: killed, handed off or stopped at each event of a run."""

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from agent_service.core.commands import (
    AbandonRun,
    ApplyVerbs,
    AttachEdge,
    CancelRun,
    FinishAppend,
    HandOff,
    RecallThought,
    Release,
    SubmitMessage,
)
from agent_service.core.effects import (
    AcknowledgeVerbs,
    AnswerAccepted,
    Effect,
    EndManager,
    ObserveMove,
    StartRun,
    StopRun,
    WriteAppend,
)
from agent_service.core.facts import OwnerChanged, RunOpened, fact_of, record_of
from agent_service.core.journal import Record, RecordKind, Seal, Sealed
from agent_service.core.manager import Manager
from steward.client.checks import check_stream
from steward.model.keys import EdgeId, Epoch, RunId, Sequence, ThreadId
from steward.model.verbs import (
    EmitEvent,
    EventType,
    FinishRun,
    Outcome,
    RecordStep,
    RepeatCall,
    RunKey,
    Verb,
)

EDGE = EdgeId("edge-0#1")
Message = Callable[..., SubmitMessage]
LATER_MS = 10**9

CALLS = ("call-1", "call-2")
Step = tuple[EventType | str, dict[str, Any]]
SCRIPT: list[Step] = [
    (EventType.AGENT_TEXT, {"message_id": "m", "delta": "a"}),
    (EventType.TOOL_EXECUTING, {"tool_call_id": CALLS[0], "tool_name": "t", "arguments": {}}),
    (
        EventType.TOOL_COMPLETED,
        {
            "tool_call_id": CALLS[0],
            "tool_name": "t",
            "success": True,
            "result": 1,
            "duration_ms": 1,
        },
    ),
    (EventType.AGENT_TEXT, {"message_id": "m", "delta": "b"}),
    ("step", {"sent": True}),
    (EventType.TOOL_EXECUTING, {"tool_call_id": CALLS[1], "tool_name": "t", "arguments": {}}),
    (
        EventType.TOOL_COMPLETED,
        {
            "tool_call_id": CALLS[1],
            "tool_name": "t",
            "success": False,
            "error": {"type": "E", "message": "no"},
            "duration_ms": 1,
        },
    ),
    (EventType.PROGRESS, {"fraction": 0.5, "label": "half"}),
    (EventType.AGENT_TEXT, {"message_id": "m", "delta": "c"}),
    ("finish", {"outcome": "success", "response": "abc"}),
]
OF_THE_RUN = [
    "user_message",
    "agent_started",
    "agent_thinking",
    *[str(kind) for kind, _ in SCRIPT if isinstance(kind, EventType)],
    "agent_completed",
]


class Player:
    """An agent that follows the script; a later attempt goes on behind what is stored."""

    def __init__(self, world: Any, manager: Manager, start: StartRun) -> None:
        self.world = world
        self.manager = manager
        self.key = start.key
        self.number = 0
        stored = [
            event
            for event in world.events()[start.since : start.until]
            if start.since and event.get("run_id") == start.key.run_id
        ]
        if any(event["type"] == "agent_thinking" for event in stored):
            world.step(manager, RecallThought(start.key.run_id))
        data = [(event["type"], event["data"]) for event in stored]
        steps = dict(start.steps)
        self.left = [
            step
            for step in SCRIPT
            if step not in data and not (step[0] == "step" and "send.1" in steps)
        ]
        open_call = [
            d["tool_call_id"]
            for kind, d in self.left
            if kind == EventType.TOOL_COMPLETED
            and any(
                k == "tool_executing" and e["tool_call_id"] == d["tool_call_id"] for k, e in data
            )
        ]
        if open_call:
            self.left.insert(0, ("repeat", {"tool_call_id": open_call[0]}))

    def verb(self, step: Step) -> Verb:
        self.number += 1
        kind, data = step
        if kind == "step":
            return RecordStep(self.key, self.number, "send.1", orjson.dumps(data))
        if kind == "repeat":
            return RepeatCall(self.key, self.number, data["tool_call_id"])
        if kind == "finish":
            return FinishRun(self.key, self.number, Outcome.SUCCESS, orjson.dumps(data))
        call = data.get("tool_call_id", "")
        return EmitEvent(self.key, self.number, EventType(kind), orjson.dumps(data), call)

    def play(self, count: int) -> list[Effect]:
        effects: list[Effect] = []
        for step in self.left[:count]:
            effects += self.world.step(self.manager, ApplyVerbs((self.verb(step),)))
        self.left = self.left[count:]
        return effects


def only(effects: list[Effect], kind: type) -> Any:
    found = [effect for effect in effects if isinstance(effect, kind)]
    assert len(found) == 1, f"{len(found)} of {kind.__name__} in {effects}"
    return found[0]


def of_kind(effects: list[Effect], kind: type) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def begin(world: Any, message: Message, epoch: int = 5, **options: Any) -> tuple[Manager, Player]:
    manager = world.manager(epoch)
    world.step(manager, AttachEdge(EDGE, 1, 0))
    start = only(world.step(manager, message("m1", **options)), StartRun)
    return manager, Player(world, manager, start)


def succeed(world: Any, epoch: int, node: str = "node-1") -> tuple[Manager, Player]:
    """The next manager, and its execution of the one open run."""
    world.effects.clear()
    manager = world.manager(epoch, node=node)
    return manager, Player(world, manager, only(world.effects, StartRun))


def assert_whole(world: Any) -> None:
    """Everything happened once, in the order of one undisturbed run."""
    events = world.events()
    assert check_stream(events) == []
    run = [event["type"] for event in events if event["type"] != "manager_moved"]
    assert run == OF_THE_RUN
    assert events[-1]["data"]["outcome"] == "success"
    left = world.log.seal(Seal(world.user, Epoch(99), "look"))
    assert isinstance(left, Sealed)
    kinds = {record.kind for record in left.records}
    assert not kinds & {RecordKind.RUN, RecordKind.CALL, RecordKind.STEP}


@pytest.mark.parametrize("how", ["kill", "hand off", "hand off at the bound", "stop"])
@pytest.mark.parametrize("position", range(len(SCRIPT)))
def test_a_run_goes_on_wherever_its_manager_ends(
    world: Any, message: Message, position: int, how: str
) -> None:
    manager, player = begin(world, message)
    player.play(position)
    in_call = bool(position and SCRIPT[position - 1][0] == EventType.TOOL_EXECUTING)
    if how != "kill":
        until_ms = 0 if how == "hand off at the bound" else LATER_MS
        departure = Release("stopped", until_ms) if how == "stop" else HandOff("move", until_ms)
        effects = world.step(manager, departure)
        if in_call and until_ms:
            assert not manager.over, "a call is open"
            effects += player.play(1)
        ended = only(effects, EndManager)
        assert (ended.handoff, ended.activate) == (how != "stop", True)
        assert of_kind(effects, StopRun) or (in_call and not until_ms)
        assert player.play(1) == [], "nothing of this execution counts any more"
    _, again = succeed(world, 6)
    start = only(world.effects, StartRun)
    assert (start.attempt, start.key.epoch) == (2, 6)
    assert again.play(100)
    assert_whole(world)
    moves = [event["data"]["cause"] for event in world.events() if event["type"] == "manager_moved"]
    expected = {"kill": ["failover"], "stop": []}.get(how, ["handoff"])
    assert moves == expected
    repeats = of_kind(world.effects, AcknowledgeVerbs)
    assert repeats, "the new execution was acknowledged"


@pytest.mark.parametrize("first", range(0, len(SCRIPT), 3))
@pytest.mark.parametrize("second", range(3))
def test_a_run_goes_on_over_two_crashes(
    world: Any, message: Message, first: int, second: int
) -> None:
    _, player = begin(world, message)
    player.play(first)
    for epoch in (6, 7):
        _, player = succeed(world, epoch, node=f"node-{epoch}")
        player.play(min(second, len(player.left) - 1))
    player.play(100)
    assert_whole(world)


def test_a_run_that_was_lost_three_times_is_not_begun_again(world: Any, message: Message) -> None:
    _, player = begin(world, message)
    player.play(2)
    succeed(world, 6)
    succeed(world, 7)
    world.effects.clear()
    world.manager(8, node="node-2")
    assert of_kind(world.effects, StartRun) == []
    tail = world.events()[-3:]
    assert [event["type"] for event in tail] == [
        "manager_moved",
        "tool_completed",
        "agent_completed",
    ]
    assert tail[2]["data"]["outcome"] == "interrupted"
    assert "3 times" in tail[2]["data"]["error"]["message"]
    assert check_stream(world.events()) == []


def test_planned_moves_count_no_crash(world: Any, message: Message) -> None:
    manager, player = begin(world, message)
    for epoch in range(6, 12):
        world.step(manager, HandOff("drain"))
        manager, player = succeed(world, epoch, node=f"node-{epoch}")
    player.play(100)
    assert_whole(world)
    assert only(of_kind(world.effects, StartRun), StartRun).attempt == 7


def test_what_a_manager_resumed_and_wrote_nothing_of_is_a_crash_too(
    world: Any, message: Message
) -> None:
    """A node that dies before the first event of a resumed run was still its owner."""
    manager, _ = begin(world, message)
    world.step(manager, Release("stopped"))
    succeed(world, 6)
    succeed(world, 7, node="node-2")
    moved = world.events()[-1]
    assert (moved["type"], moved["data"]["cause"]) == ("manager_moved", "failover")
    assert moved["data"]["from_node"] == "node-1"


@pytest.mark.parametrize(("departure", "how"), [(None, "lost"), (HandOff("move"), "stopped")])
def test_a_run_of_an_agent_that_does_not_resume_ends_once(
    world: Any, message: Message, departure: HandOff | None, how: str
) -> None:
    manager, player = begin(world, message, agent="fragile")
    player.play(2)
    if departure is not None:
        world.step(manager, departure)
    world.effects.clear()
    world.manager(6, node="node-1")
    tail = [event["type"] for event in world.events()[-3:]]
    assert tail == ["manager_moved", "tool_completed", "agent_completed"]
    data = world.events()[-1]["data"]
    assert data["outcome"] == "failed" and how in data["error"]["message"]
    assert check_stream(world.events()) == []


def test_an_agent_that_does_not_resume_may_end_before_its_manager_moves(
    world: Any, message: Message
) -> None:
    manager, player = begin(world, message, agent="fragile")
    player.play(1)
    assert of_kind(world.step(manager, HandOff("move", LATER_MS)), EndManager) == []
    ended = only(player.play(100), EndManager)
    assert not ended.activate
    assert_whole(world)


def test_a_later_attempt_gets_its_steps_and_where_its_events_begin(
    world: Any, message: Message
) -> None:
    _, player = begin(world, message)
    player.play(5)
    succeed(world, 6)
    start = only(world.effects, StartRun)
    assert start.steps == (("send.1", b'{"sent":true}'),)
    assert (start.since, start.until) == (1, world.events()[-1]["sequence"])
    # And once more: what was handed on is not lost by that.
    succeed(world, 7, node="node-2")
    assert only(world.effects, StartRun).steps == (("send.1", b'{"sent":true}'),)


def test_steps_of_two_runs_are_kept_apart(world: Any, message: Message) -> None:
    manager, player = begin(world, message)
    other = only(world.step(manager, message("m2", thread="side")), StartRun)
    player.play(5)
    world.step(
        manager, ApplyVerbs((RecordStep(other.key, 1, "send.1", b"2"), finish(other.key, 2)))
    )
    succeed(world, 6)
    assert dict(only(world.effects, StartRun).steps) == {"send.1": b'{"sent":true}'}


def finish(key: RunKey, number: int) -> FinishRun:
    data = orjson.dumps({"outcome": "success", "response": ""})
    return FinishRun(key, number, Outcome.SUCCESS, data)


def test_a_repeated_call_is_acknowledged_only_when_its_intent_is_stored_again(
    world: Any, message: Message
) -> None:
    _, player = begin(world, message)
    player.play(2)
    manager, again = succeed(world, 6)
    repeat = again.verb(again.left.pop(0))
    assert isinstance(repeat, RepeatCall)
    effects = manager.handle(0, ApplyVerbs((repeat,)), world.wall_ms)
    append = only(effects, WriteAppend).append
    assert [(r.kind, r.key) for r in append.records] == [(RecordKind.CALL, CALLS[0])]
    assert append.events == ()
    released = manager.handle(
        0, FinishAppend(append.append_number, world.log.append(append)), world.wall_ms
    )
    assert only(released, AcknowledgeVerbs).acknowledged.number == 1


def test_a_call_is_completed_once_whatever_an_agent_says(world: Any, message: Message) -> None:
    manager, player = begin(world, message)
    player.play(3)
    completed = player.verb(SCRIPT[2])
    world.step(manager, ApplyVerbs((completed, player.verb(("finish", SCRIPT[-1][1])))))
    assert check_stream(world.events()) == []


def test_a_resumed_run_can_be_cancelled(world: Any, message: Message) -> None:
    _, player = begin(world, message)
    player.play(2)
    manager, again = succeed(world, 6)
    world.step(manager, CancelRun(EDGE, 2, again.key.run_id, ThreadId("")))
    assert [e["type"] for e in world.events()[-2:]] == ["tool_completed", "agent_completed"]
    assert world.events()[-1]["data"]["outcome"] == "cancelled"
    assert again.play(100) == []
    assert check_stream(world.events()) == []


def test_a_queue_goes_on_behind_a_resumed_run(world: Any, message: Message) -> None:
    manager, player = begin(world, message)
    waiting = only(world.step(manager, message("m2")), AnswerAccepted)
    player.play(1)
    _, again = succeed(world, 6)
    next_run = only(again.play(100), StartRun)
    assert next_run.key.run_id == waiting.run_id
    assert (next_run.attempt, next_run.since) == (1, 0)
    assert check_stream(world.events())[0].kind == "run_not_ended"


def test_a_run_whose_journal_can_not_be_had_fails(world: Any, message: Message) -> None:
    manager, player = begin(world, message)
    waiting = only(world.step(manager, message("m2")), AnswerAccepted)
    player.play(2)
    manager, again = succeed(world, 6)
    effects = world.step(manager, AbandonRun(again.key.run_id, "JournalUnreadable", "too long"))
    kinds = [event["type"] for event in world.events()[-3:]]
    assert kinds == ["tool_completed", "agent_completed", "agent_started"]
    ended = world.events()[-2]["data"]
    assert ended["outcome"] == "failed"
    assert ended["error"] == {"type": "JournalUnreadable", "message": "too long"}
    assert only(effects, StartRun).key.run_id == waiting.run_id


def test_the_gap_of_a_planned_move_is_measured_from_its_last_record(
    world: Any, message: Message
) -> None:
    manager, _ = begin(world, message)
    world.step(manager, HandOff("drain"))
    world.wall_ms += 73
    world.effects.clear()
    world.manager(6, node="node-1", gap_ms=None)
    assert world.events()[-1]["data"]["gap_ms"] == 73
    assert only(world.effects, ObserveMove) == ObserveMove("handoff", 73)
    # Who was attached knows better.
    world.step(world.manager(7, node="node-2", gap_ms=9), HandOff("drain"))
    world.manager(8, node="node-3", gap_ms=41)
    assert world.events()[-1]["data"]["gap_ms"] == 41


def test_records_without_an_attempt_are_read_as_the_first() -> None:
    value = {
        "thread": "main",
        "agent": "echo",
        "sequence": 3,
        "content": "hi",
        "trace": "t",
        "started": 7,
    }
    fact = fact_of(Record(RecordKind.RUN, "r3", orjson.dumps(value)))
    assert isinstance(fact, RunOpened)
    assert (fact.attempt, fact.crashes) == (1, 0)
    owner = fact_of(Record(RecordKind.OWNER, "owner", b'{"node":"n","epoch":4,"released":""}'))
    assert owner == OwnerChanged("n", Epoch(4), "")
    run = RunOpened(
        RunId("r"), ThreadId("t"), "a", Sequence(1), b'"x"', "", 5, attempt=3, crashes=2
    )
    assert fact_of(record_of(run)) == run
