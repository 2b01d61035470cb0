"""Rules of the manager, on the real in-memory log."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from agent_service.core.commands import (
    AnnounceClient,
    ApplyVerbs,
    AttachEdge,
    CancelRun,
    Fence,
    FinishAppend,
    Release,
    SubmitMessage,
)
from agent_service.core.effects import (
    AcknowledgeVerbs,
    AnswerAccepted,
    AnswerAttached,
    AnswerCancelled,
    AnswerRefused,
    CountRun,
    Deliver,
    Effect,
    EndManager,
    StartRun,
    StopRun,
    TellClientTaken,
    WriteAppend,
)
from agent_service.core.facts import MessageAccepted, record_of
from agent_service.core.grants import Grant, GrantBook, GrantRefused
from agent_service.core.journal import Append, Fenced, Seal, Sealed
from agent_service.core.manager import MOST_MESSAGE_IDS, Manager
from steward.errors import Reason
from steward.model.keys import (
    EdgeId,
    Epoch,
    NodeId,
    NodeIncarnation,
    NodeRev,
    RunId,
    Sequence,
    ThreadId,
)
from steward.model.placement import Placement
from steward.model.verbs import EventType, Outcome

EDGE = EdgeId("edge-0#1")
Message = Callable[..., SubmitMessage]


def only(effects: list[Effect], kind: type) -> Any:
    found = [effect for effect in effects if isinstance(effect, kind)]
    assert len(found) == 1, f"{len(found)} of {kind.__name__} in {effects}"
    return found[0]


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def attach(world: Any, manager: Manager) -> None:
    world.step(manager, AttachEdge(EDGE, 1, 0))


def test_a_message_is_accepted_only_after_its_event_is_stored(world: Any, message: Message) -> None:
    manager = world.manager(5)
    effects = manager.handle(0, message("m1"), world.wall_ms)
    assert [type(effect) for effect in effects] == [WriteAppend]
    outcome = world.log.append(effects[0].append)
    released = manager.handle(0, FinishAppend(1, outcome), world.wall_ms)
    accepted = only(released, AnswerAccepted)
    assert (accepted.sequence, accepted.duplicate, accepted.queue_position) == (1, False, 0)
    assert only(released, StartRun).key.run_id == accepted.run_id


def test_nothing_is_delivered_before_the_log_has_it(world: Any, message: Message) -> None:
    manager = world.manager(5)
    attach(world, manager)
    effects = manager.handle(0, message("m1"), world.wall_ms)
    assert not [effect for effect in effects if isinstance(effect, Deliver)]
    outcome = world.log.append(effects[0].append)
    delivered = only(manager.handle(0, FinishAppend(1, outcome), world.wall_ms), Deliver)
    assert (delivered.first, delivered.last) == (1, 2)


def test_at_most_one_append_is_in_flight(world: Any, message: Message) -> None:
    manager = world.manager(5)
    first = manager.handle(0, message("m1"), world.wall_ms)
    assert isinstance(first[0], WriteAppend)
    assert manager.handle(0, message("m2"), world.wall_ms) == []
    outcome = world.log.append(first[0].append)
    released = manager.handle(0, FinishAppend(1, outcome), world.wall_ms)
    second = only(released, WriteAppend).append
    assert (second.expected_sequence, len(second.events)) == (3, 1)


def test_a_repeated_message_id_is_answered_with_the_first_result(
    world: Any, message: Message
) -> None:
    manager = world.manager(5)
    first = only(world.step(manager, message("m1")), AnswerAccepted)
    again = only(world.step(manager, message("m1", "other text")), AnswerAccepted)
    assert again.duplicate
    assert (again.run_id, again.sequence) == (first.run_id, first.sequence)
    assert types(world.events()).count("user_message") == 1


def test_a_repeated_message_id_is_known_to_the_next_manager(world: Any, message: Message) -> None:
    first = only(world.step(world.manager(5), message("m1")), AnswerAccepted)
    again = only(world.step(world.manager(6), message("m1")), AnswerAccepted)
    assert again.duplicate
    assert again.run_id == first.run_id


def test_an_edge_that_attaches_late_hears_of_clients_that_came_back_elsewhere(world: Any) -> None:
    # Their old connections may be at this edge, known to the manager before and not announced anew.
    manager, late = world.manager(5), EdgeId("edge-1#1")
    attach(world, manager)
    world.step(manager, AnnounceClient(EDGE, "tab"))
    effects = world.step(manager, AttachEdge(late, 1, 0))
    assert only(effects, TellClientTaken) == TellClientTaken((late,), "tab")
    assert isinstance(effects[0], AnswerAttached), "or it would not know which manager says so"
    # Not the edge that announced it, and not again at each mark.
    for edge in (EDGE, late):
        assert len(world.step(manager, AttachEdge(edge, 2, 0))) == 1


def test_no_more_message_ids_are_kept_than_a_manager_reads_in_an_instant(
    world: Any, message: Message
) -> None:
    # All of the last minute, so that their age frees none of them.
    world.log.seal(Seal(world.user, Epoch(4), "before"))
    known = [
        MessageAccepted(
            f"old-{n}", RunId(f"r-{n}"), Sequence(n), world.wall_ms - MOST_MESSAGE_IDS + n
        )
        for n in range(MOST_MESSAGE_IDS)
    ]
    records = tuple(record_of(fact) for fact in known)
    world.log.append(Append(world.user, Epoch(4), 1, Sequence(1), (), records))
    manager = world.manager(5)
    world.step(manager, message("new"))
    assert manager.snapshot()["messages"] == MOST_MESSAGE_IDS
    assert only(world.step(manager, message("old-1")), AnswerAccepted).duplicate
    assert not only(world.step(manager, message("old-0")), AnswerAccepted).duplicate


def test_a_run_without_a_thought_gets_one_before_its_text(
    world: Any, message: Message, verb: Any, finish: Any
) -> None:
    manager = world.manager(5)
    key = only(world.step(manager, message("m1")), StartRun).key
    text = verb(key, 1, EventType.AGENT_TEXT, {"message_id": "x", "delta": "hi"})
    effects = world.step(manager, ApplyVerbs((text, finish(key, 2))))
    assert only(effects, AcknowledgeVerbs).acknowledged.number == 2
    assert types(world.events()) == [
        "user_message",
        "agent_started",
        "agent_thinking",
        "agent_text",
        "agent_completed",
    ]
    assert world.events()[-1]["data"]["outcome"] == "success"
    assert isinstance(world.events()[-1]["data"]["duration_ms"], int)


def test_runs_of_one_thread_wait_for_each_other_and_threads_do_not(
    world: Any, message: Message, finish: Any
) -> None:
    manager = world.manager(5)
    first = only(world.step(manager, message("m1")), StartRun)
    waiting = world.step(manager, message("m2"))
    assert only(waiting, AnswerAccepted).queue_position == 1
    other = world.step(manager, message("m3", thread="side"))
    assert only(other, StartRun).thread_id == "side"
    after = world.step(manager, ApplyVerbs((finish(first.key, 1),)))
    assert only(after, StartRun).key.run_id == only(waiting, AnswerAccepted).run_id


def test_overlap_reject_refuses_while_a_run_is_active_and_frees_the_id(
    world: Any, message: Message, finish: Any
) -> None:
    manager = world.manager(5)
    key = only(world.step(manager, message("m1")), StartRun).key
    refused = only(world.step(manager, message("m2", overlap="reject")), AnswerRefused)
    assert refused.reason is Reason.OVERLAP_REJECTED
    world.step(manager, ApplyVerbs((finish(key, 1),)))
    assert not only(world.step(manager, message("m2", overlap="reject")), AnswerAccepted).duplicate


def test_a_full_queue_refuses_with_its_reason(world: Any, message: Message) -> None:
    manager = world.manager(5)
    for number in range(33):
        only(world.step(manager, message(f"m{number}")), AnswerAccepted)
    assert only(world.step(manager, message("one more")), AnswerRefused).reason is Reason.QUEUE_FULL


def test_more_messages_than_a_minute_allows_are_told_when_to_come_back(
    world: Any, message: Message, finish: Any
) -> None:
    manager = world.manager(5)
    for number in range(600):
        key = only(world.step(manager, message(f"m{number}")), StartRun).key
        world.step(manager, ApplyVerbs((finish(key, 1),)))
    refused = only(world.step(manager, message("one more")), AnswerRefused)
    assert refused.reason is Reason.RATE_LIMITED
    world.now_ms += refused.retry_after_ms
    only(world.step(manager, message("one more")), AnswerAccepted)


def test_an_unknown_agent_is_refused_with_the_names_that_are_served(
    world: Any, message: Message
) -> None:
    refused = only(world.step(world.manager(5), message("m1", agent="nobody")), AnswerRefused)
    assert refused.reason is Reason.NOT_FOUND
    assert "echo, other, fragile" in refused.message


def test_cancel_completes_open_tools_and_the_run_exactly_once(
    world: Any, message: Message, verb: Any, finish: Any
) -> None:
    manager = world.manager(5)
    key = only(world.step(manager, message("m1")), StartRun).key
    call = {"tool_call_id": "c1", "tool_name": "query", "arguments": {}}
    world.step(manager, ApplyVerbs((verb(key, 1, EventType.TOOL_EXECUTING, call),)))
    effects = world.step(manager, CancelRun(EDGE, 9, key.run_id, ThreadId("")))
    assert only(effects, AnswerCancelled).run_id == key.run_id
    assert only(effects, StopRun).key == key
    late = world.step(manager, ApplyVerbs((finish(key, 2),)))
    assert late == []
    assert types(world.events())[-2:] == ["tool_completed", "agent_completed"]
    assert world.events()[-1]["data"]["outcome"] == "cancelled"
    again = world.step(manager, CancelRun(EDGE, 10, key.run_id, ThreadId("")))
    assert only(again, AnswerCancelled).run_id == key.run_id
    assert types(world.events()).count("agent_completed") == 1


def test_a_cancelled_run_that_waited_has_one_start_and_one_end(
    world: Any, message: Message
) -> None:
    manager = world.manager(5)
    world.step(manager, message("m1"))
    waiting = only(world.step(manager, message("m2")), AnswerAccepted)
    world.step(manager, CancelRun(EDGE, 9, waiting.run_id, ThreadId("")))
    mine = [e["type"] for e in world.events() if e.get("run_id") == waiting.run_id]
    assert mine == ["user_message", "agent_started", "agent_completed"]


def test_cancel_of_a_run_that_never_was_is_not_found(world: Any) -> None:
    manager = world.manager(5)
    refused = only(
        world.step(manager, CancelRun(EDGE, 9, RunId("r1"), ThreadId(""))), AnswerRefused
    )
    assert refused.reason is Reason.NOT_FOUND


def test_a_new_manager_ends_what_does_not_resume_and_runs_what_waits(
    world: Any, message: Message, verb: Any
) -> None:
    old = world.manager(5)
    key = only(world.step(old, message("m1", agent="fragile")), StartRun).key
    call = {"tool_call_id": "c1", "tool_name": "query", "arguments": {}}
    world.step(old, ApplyVerbs((verb(key, 1, EventType.TOOL_EXECUTING, call),)))
    waiting = only(world.step(old, message("m2")), AnswerAccepted)
    world.effects.clear()
    world.manager(6, node="node-1", gap_ms=40)
    tail = world.events()[-4:]
    assert types(tail) == ["manager_moved", "tool_completed", "agent_completed", "agent_started"]
    assert tail[0]["data"] == {
        "from_node": "node-0",
        "to_node": "node-1",
        "cause": "failover",
        "gap_ms": 40,
    }
    assert tail[1]["data"]["error"]["type"] == "Interrupted"
    assert tail[2]["data"]["outcome"] == "failed"
    assert only(world.effects, StartRun).key.run_id == waiting.run_id
    assert [event["sequence"] for event in world.events()] == list(range(1, 10))


def test_a_released_manager_leaves_no_notice_of_a_move(world: Any, message: Message) -> None:
    manager = world.manager(5)
    world.step(manager, message("m1"))
    ended = only(world.step(manager, Release("stopped")), EndManager)
    assert ended.fence == 0
    assert manager.over
    world.manager(6, node="node-1")
    assert "manager_moved" not in types(world.events())


def test_after_a_release_messages_go_to_the_next_manager(world: Any, message: Message) -> None:
    manager = world.manager(5)
    world.step(manager, message("m0"))
    pending = manager.handle(0, Release("stopped"), world.wall_ms)
    refused = manager.handle(0, message("m1"), world.wall_ms)
    assert refused == []
    effects = world.perform(manager, pending)
    assert any(isinstance(effect, EndManager) for effect in effects)
    accepted = only(world.step(world.manager(6), message("m1")), AnswerAccepted)
    assert not accepted.duplicate


def test_stale_epoch_append_is_refused_and_ends_the_manager(world: Any, message: Message) -> None:
    old = world.manager(5)
    attach(world, old)
    world.manager(6, node="node-1")
    effects = world.step(old, message("m1"))
    ended = only(effects, EndManager)
    assert ended.fence == 6
    assert not [effect for effect in effects if isinstance(effect, Deliver | AnswerAccepted)]
    assert world.step(old, message("m2")) == []


def test_a_fenced_manager_does_nothing_more(world: Any, message: Message) -> None:
    manager = world.manager(5)
    assert only(world.step(manager, Fence(Epoch(9))), EndManager).fence == 9
    assert world.step(manager, message("m1")) == []


def test_who_attaches_is_told_where_the_log_begins_now(world: Any) -> None:
    manager = world.manager(5)
    for oldest in (4, 3):
        manager.trimmed(oldest)
        attached = only(manager.handle(0, AttachEdge(EDGE, 3, 0), world.wall_ms), AnswerAttached)
        assert attached.oldest_sequence == 4


def test_an_attach_names_the_last_stored_event_and_hears_what_comes_after(
    world: Any, message: Message
) -> None:
    manager = world.manager(5)
    in_flight = manager.handle(0, message("m1"), world.wall_ms)
    attached = only(manager.handle(0, AttachEdge(EDGE, 3, 0), world.wall_ms), AnswerAttached)
    assert attached.sequence == 0
    world.perform(manager, in_flight)
    assert [event["sequence"] for event in world.delivered] == [1, 2]


def test_verbs_of_another_execution_are_dropped(world: Any, message: Message, finish: Any) -> None:
    old_key = only(world.step(world.manager(5), message("m1")), StartRun).key
    manager = world.manager(6)
    before = len(world.events())
    assert world.step(manager, ApplyVerbs((finish(old_key, 1),))) == []
    assert len(world.events()) == before


def test_a_verb_that_comes_twice_counts_once(world: Any, message: Message, verb: Any) -> None:
    manager = world.manager(5)
    key = only(world.step(manager, message("m1")), StartRun).key
    think = verb(key, 1, EventType.AGENT_THINKING, {"thought": "a", "delta": False})
    world.step(manager, ApplyVerbs((think, think)))
    assert types(world.events()).count("agent_thinking") == 1


def test_what_would_overfill_an_append_waits_for_the_next_one(
    world: Any, message: Message, verb: Any, finish: Any
) -> None:
    manager = world.manager(5)
    attach(world, manager)
    key = only(world.step(manager, message("m1")), StartRun).key
    large = {"name": "blob", "value": "x" * 1_000_000}
    verbs = tuple(verb(key, number, EventType.CUSTOM, large) for number in range(1, 21))
    effects = world.step(manager, ApplyVerbs((*verbs, finish(key, 21))))
    appends = [effect.append for effect in effects if isinstance(effect, WriteAppend)]
    sizes = [sum(len(event.payload) for event in append.events) for append in appends]
    assert max(sizes) < 4_000_000
    assert types(world.delivered).count("custom") == 20
    assert [event["sequence"] for event in world.delivered] == list(range(1, 25))
    assert only(effects, CountRun).outcome is Outcome.SUCCESS


def test_every_event_has_the_fields_of_the_protocol(world: Any, message: Message) -> None:
    world.step(world.manager(5), message('m"1', thread='t"1'))
    for event in world.events():
        assert event["stream_id"] and event["epoch"] == 5 and event["event_id"]
        assert event["thread_id"] == 't"1'
        assert event["agent"] == "echo"
        assert event["time"].endswith("Z") and event["trace"].startswith("00-")
    assert len({event["event_id"] for event in world.events()}) == len(world.events())


@pytest.mark.parametrize(
    "make",
    [
        lambda manager, sealed: Manager(None, sealed, manager._policy),  # type: ignore[arg-type]
        lambda manager, sealed: type("Sub", (Manager,), {}),
        lambda manager, sealed: copy.copy(manager),
        lambda manager, sealed: copy.deepcopy(manager),
        lambda manager, sealed: pickle.dumps(manager),
        lambda manager, sealed: Grant(
            Placement(manager.user, Epoch(7), NodeId("n"), NodeRev(7), "a:1"),
            GrantBook(NodeIncarnation(NodeId("n"), NodeRev(7))),
        ),
    ],
    ids=["without a grant", "subclass", "copy", "deepcopy", "pickle", "own grant"],
)
def test_a_manager_is_made_from_a_granted_placement_and_in_no_other_way(
    world: Any, make: Any
) -> None:
    manager = world.manager(5)
    sealed = world.log.seal(Seal(manager.user, Epoch(6), "x"))
    assert isinstance(sealed, Sealed)
    with pytest.raises(RuntimeError, match="registry"):
        make(manager, sealed)


def test_a_grant_is_good_for_one_manager(world: Any) -> None:
    user = world.manager(5).user
    incarnation = NodeIncarnation(NodeId("node-0"), NodeRev(3))
    book = GrantBook(incarnation)
    book.learn(Placement(user, Epoch(9), incarnation.node_id, incarnation.node_rev, "a:1"))
    with pytest.raises(GrantRefused) as stale:
        book.take(user, Epoch(8))
    assert stale.value.kind == "stale_epoch"
    with pytest.raises(GrantRefused) as forged:
        book.take(user, Epoch(10))
    assert forged.value.kind == "forged_epoch"
    book.take(user, Epoch(9))
    with pytest.raises(GrantRefused) as second:
        book.take(user, Epoch(9))
    assert second.value.kind == "second_manager"


def test_a_placement_of_another_node_is_no_grant() -> None:
    from steward.model.keys import UserKey

    user = UserKey("default", "bob")
    book = GrantBook(NodeIncarnation(NodeId("node-0"), NodeRev(3)))
    book.learn(Placement(user, Epoch(9), NodeId("node-1"), NodeRev(3), "a:1"))
    with pytest.raises(GrantRefused) as refused:
        book.take(user, Epoch(9))
    assert refused.value.kind == "unknown_placement"


def test_a_seal_below_the_fence_is_refused(world: Any) -> None:
    user = world.manager(6).user
    assert world.log.seal(Seal(user, Epoch(5), "late")) == Fenced(Epoch(6))


def test_outcomes_cover_the_protocol() -> None:
    assert {outcome.value for outcome in Outcome} == {
        "success",
        "failed",
        "cancelled",
        "interrupted",
    }
