"""`Attachment`: finds the manager, follows it, and loses no command on the way."""

import itertools

import pytest

from edge.core.attachment import (
    ABANDON_MS,
    ATTACH_ANSWER_MS,
    LINGER_MS,
    MOST_BACKOFF_MS,
    MOST_PENDING,
    Attachment,
    AttachmentState,
)
from edge.core.attachment_values import (
    Answered,
    Behind,
    ClientCame,
    ClientLeft,
    Effect,
    EndClient,
    EndSessions,
    Evicted,
    HeadKnown,
    HeadRefreshed,
    NodeLost,
    Occupied,
    Over,
    PlacementMoved,
    Resolved,
    ResolveFailed,
    ResolveManager,
    SearchFailed,
    SendCommand,
    Settle,
    Submit,
    Tick,
    Trimmed,
    Vacated,
)
from edge.core.commands import (
    Accepted,
    AnnounceClient,
    Answer,
    AnswerBody,
    Attach,
    Attached,
    CancelRun,
    ClientTaken,
    Detach,
    ManagerLost,
    Refused,
    SubmitMessage,
)
from steward.errors import Reason
from steward.model.keys import Epoch, NodeId, NodeRev, StreamId, UserKey
from steward.model.placement import Placement

ALICE = UserKey("default", "alice")


def placement(epoch: int, node: str = "n1", rev: int = 1) -> Placement:
    return Placement(ALICE, Epoch(epoch), NodeId(node), NodeRev(rev), f"{node}:1")


def answer(epoch: int, command_id: int, body: AnswerBody) -> Answered:
    return Answered(Answer(ALICE, Epoch(epoch), command_id, body))


def message(id: str) -> SubmitMessage:
    return SubmitMessage(id, b'"x"', "main")


def fresh(per_minute: int = 10_000) -> Attachment:
    attachment = Attachment(0, ALICE, per_minute, itertools.count(1), 0)
    assert attachment.handle(0, Occupied()) == [ResolveManager(0)]
    return attachment


def commands(effects: list[Effect]) -> list[SendCommand]:
    return [e for e in effects if isinstance(e, SendCommand)]


def attach(attachment: Attachment, epoch: int, node: str = "n1", sequence: int = 5) -> list[Effect]:
    """Resolve and attach under an epoch; the effects of the answer."""
    (asked,) = attachment.handle(0, Resolved(placement(epoch, node)))
    assert isinstance(asked, SendCommand) and asked.command.body == Attach()
    body = Attached(StreamId("s1"), sequence, 1)
    return attachment.handle(0, answer(epoch, asked.command.command_id, body))


def live(epoch: int = 7, per_minute: int = 10_000) -> Attachment:
    attachment = fresh(per_minute)
    (known,) = attach(attachment, epoch)
    assert isinstance(known, HeadKnown) and known.head.sequence == 5
    assert attachment.live_epoch == epoch
    return attachment


# ---- finding and following


def test_resolve_attach_live() -> None:
    attachment = live()
    assert attachment.state is AttachmentState.LIVE and attachment.next_deadline() is None
    later = attachment.head(9)
    assert later is not None and (later.sequence, later.epoch) == (9, 7)


@pytest.mark.parametrize("known", [0, 12])
def test_a_lost_manager_is_resolved_above_its_epoch(known: int) -> None:
    attachment = live(7)
    effects = attachment.handle(0, answer(7, 0, ManagerLost("MANAGER_MOVED", known)))
    assert effects == [ResolveManager(max(8, known))]
    assert attachment.live_epoch == 0 and attachment.head(9) is None


def test_who_has_seen_more_than_the_edge_waits_for_the_managers_head() -> None:
    attachment = live(7)
    (asked,) = commands(attachment.handle(0, Behind()))
    assert asked.command.body == Attach()
    assert attachment.live_epoch == 7, "deliveries go on meanwhile"
    assert attachment.handle(0, Behind()) == [], "one question for all"
    body = Attached(StreamId("s1"), 20, 1)
    (known,) = attachment.handle(0, answer(7, asked.command.command_id, body))
    assert isinstance(known, HeadRefreshed) and known.head.sequence == 20
    later = attachment.head(9)
    assert later is not None and later.sequence == 20


def test_sessions_begin_where_the_log_begins_now_whatever_a_manager_says() -> None:
    attachment = live(7)
    attachment.handle(0, Trimmed(StreamId("s1"), 4))
    attachment.handle(0, Trimmed(StreamId("s1"), 3))
    attachment.handle(0, Trimmed(StreamId("of another stream"), 5))
    head = attachment.head(9)
    assert head is not None and head.oldest == 4
    attachment.handle(0, NodeLost(placement(7).incarnation, fenced=True))
    (known,) = attach(attachment, 9)
    assert isinstance(known, HeadKnown) and known.head.oldest == 4


def test_a_head_that_was_asked_of_a_lost_manager_is_not_taken() -> None:
    attachment = live(7)
    (asked,) = commands(attachment.handle(0, Behind()))
    attachment.handle(0, NodeLost(placement(7).incarnation, fenced=True))
    body = Attached(StreamId("s1"), 20, 1)
    assert attachment.handle(0, answer(7, asked.command.command_id, body)) == []


def test_a_node_that_knows_an_older_epoch_is_asked_again_under_the_same() -> None:
    attachment = fresh()
    (asked,) = commands(attachment.handle(0, Resolved(placement(9))))
    refused = Refused(Reason.EPOCH_STALE, "still making an older one", known_epoch=7)
    attachment.handle(0, answer(9, asked.command.command_id, refused))
    assert attachment.handle(MOST_BACKOFF_MS, Tick()) == [ResolveManager(9)]


def test_an_attach_after_a_loss_says_how_long_the_manager_was_missed() -> None:
    attachment = live(7)
    attachment.handle(1_000, NodeLost(placement(7).incarnation, fenced=True))
    (asked,) = commands(attachment.handle(1_040, Resolved(placement(9, "n2"))))
    assert asked.command.body == Attach(gap_ms=40)
    body = Attached(StreamId("s1"), 5, 1)
    attachment.handle(1_041, answer(9, asked.command.command_id, body))
    (moved,) = commands(attachment.handle(9_000, PlacementMoved(placement(11, "n3"))))
    assert moved.command.body == Attach(gap_ms=1)


def test_news_of_an_older_manager_changes_nothing() -> None:
    attachment = live(7)
    assert attachment.handle(0, answer(6, 0, ManagerLost("x", 0))) == []
    assert attachment.live_epoch == 7


def test_an_answer_of_an_earlier_attach_is_ignored() -> None:
    attachment = fresh()
    (asked,) = commands(attachment.handle(0, Resolved(placement(7))))
    attachment.handle(0, NodeLost(placement(7).incarnation, fenced=True))
    attachment.handle(0, Resolved(placement(9, "n2")))
    late = answer(7, asked.command.command_id, Attached(StreamId("s1"), 1, 1))
    assert attachment.handle(0, late) == [] and attachment.live_epoch == 0


def test_a_fenced_node_is_resolved_above_the_epoch_and_a_broken_stream_at_it() -> None:
    for fenced, least in ((True, 8), (False, 7)):
        attachment = live(7)
        gone = NodeLost(placement(7).incarnation, fenced=fenced)
        assert attachment.handle(0, gone) == [ResolveManager(least)]


def test_the_loss_of_another_node_is_nothing() -> None:
    attachment = live(7)
    other = placement(7, "n1", rev=2).incarnation
    assert attachment.handle(0, NodeLost(other, fenced=True)) == []
    assert attachment.live_epoch == 7


def test_a_stale_placement_is_never_attached() -> None:
    attachment = live(7)
    attachment.handle(0, NodeLost(placement(7).incarnation, fenced=True))
    effects = attachment.handle(0, Resolved(placement(7)))
    assert effects == [SearchFailed(Reason.MANAGER_UNAVAILABLE)]
    assert attachment.state is AttachmentState.WAITING and attachment.max_epoch == 7


def test_a_pushed_move_is_followed_without_asking_and_never_backwards() -> None:
    attachment = live(7)
    (asked,) = commands(attachment.handle(0, PlacementMoved(placement(9, "n2"))))
    assert asked.placement.node_id == "n2" and attachment.live_epoch == 0
    assert attachment.handle(0, PlacementMoved(placement(8, "n3"))) == []
    assert attachment.max_epoch == 9


def test_a_stale_attach_comes_back_with_the_epoch_that_the_node_knows() -> None:
    attachment = fresh()
    (asked,) = commands(attachment.handle(0, Resolved(placement(7))))
    refused = Refused(Reason.EPOCH_STALE, "stale", known_epoch=11)
    effects = attachment.handle(0, answer(7, asked.command.command_id, refused))
    assert effects == [SearchFailed(Reason.EPOCH_STALE)]
    due = attachment.next_deadline()
    assert due is not None and attachment.handle(due, Tick()) == [ResolveManager(11)]


def test_backoff_doubles_to_a_second_and_never_ends() -> None:
    attachment = fresh()
    waits, now = [], 0
    for _ in range(12):
        attachment.handle(now, ResolveFailed(Reason.NO_CAPACITY))
        due = attachment.next_deadline()
        assert due is not None
        waits.append(due - now)
        assert attachment.handle(due - 1, Tick()) == []
        now = due
        assert attachment.handle(now, Tick()) == [ResolveManager(0)]
    assert waits[:5] == [25, 50, 100, 200, 400] and set(waits[6:]) == {MOST_BACKOFF_MS // 2}


def test_a_silent_node_is_asked_about_again() -> None:
    attachment = fresh()
    attachment.handle(0, Resolved(placement(7)))
    assert attachment.next_deadline() == ATTACH_ANSWER_MS
    effects = attachment.handle(ATTACH_ANSWER_MS, Tick())
    assert effects == [SearchFailed(Reason.MANAGER_UNAVAILABLE), ResolveManager(7)]


def test_a_node_that_can_not_be_dialled_is_not_dialled_in_a_loop() -> None:
    attachment = fresh()
    attachment.handle(0, Resolved(placement(7)))
    effects = attachment.handle(0, NodeLost(placement(7).incarnation, fenced=False))
    assert effects == [SearchFailed(Reason.MANAGER_UNAVAILABLE)]
    # The registry's word that it is fenced ends the waiting.
    gone = NodeLost(placement(7).incarnation, fenced=True)
    assert attachment.handle(0, gone) == [ResolveManager(8)]


# ---- commands


def test_commands_are_kept_until_attached_and_sent_in_order() -> None:
    attachment = fresh()
    for n in range(3):
        assert attachment.handle(0, Submit(n, "trace", message(f"m{n}"))) == []
    effects = attach(attachment, 7)
    bodies = [e.command.body for e in commands(effects)]
    assert bodies == [message("m0"), message("m1"), message("m2")]
    assert {e.command.epoch for e in commands(effects)} == {7}


def test_commands_without_an_answer_go_to_the_next_manager() -> None:
    attachment = live(7)
    first = commands(attachment.handle(0, Submit(1, "", message("m1"))))[0].command
    second = commands(attachment.handle(0, Submit(2, "", message("m2"))))[0].command
    accepted = Accepted("m1", "r1", 6, False, 0)
    assert attachment.handle(0, answer(7, first.command_id, accepted)) == [Settle(1, accepted)]
    attachment.handle(0, answer(7, 0, ManagerLost("x", 0)))
    resent = [e.command for e in commands(attach(attachment, 8, "n2"))]
    assert [(c.body, c.epoch) for c in resent] == [(message("m2"), 8)]
    duplicate = Accepted("m2", "r2", 7, True, 0)
    settled = attachment.handle(0, answer(8, second.command_id, duplicate))
    assert settled == [Settle(2, duplicate)]
    assert attachment.handle(0, answer(8, second.command_id, duplicate)) == []


@pytest.mark.parametrize(
    "reason", [Reason.EPOCH_STALE, Reason.MANAGER_MOVED, Reason.PLACEMENT_UNKNOWN]
)
def test_a_refusal_that_means_elsewhere_keeps_the_command(reason: Reason) -> None:
    attachment = live(7)
    sent = commands(attachment.handle(0, Submit(1, "", message("m1"))))[0].command
    effects = attachment.handle(0, answer(7, sent.command_id, Refused(reason, "no")))
    assert effects == [ResolveManager(7)]
    assert len(commands(attach(attachment, 8))) == 1


def test_a_refusal_for_the_client_settles_the_command() -> None:
    attachment = live(7)
    sent = commands(attachment.handle(0, Submit(1, "", CancelRun("r9"))))[0].command
    refused = Refused(Reason.NOT_FOUND, "no such run")
    assert attachment.handle(0, answer(7, sent.command_id, refused)) == [Settle(1, refused)]


def test_the_buffer_is_bounded() -> None:
    attachment = fresh()
    for n in range(MOST_PENDING):
        assert attachment.handle(0, Submit(n, "", message(f"m{n}"))) == []
    (settle,) = attachment.handle(0, Submit(999, "", message("more")))
    assert isinstance(settle, Settle) and isinstance(settle.outcome, Refused)
    assert settle.outcome.reason is Reason.RATE_LIMITED


def test_a_user_is_limited_per_minute_over_all_connections() -> None:
    attachment = live(per_minute=2)
    assert commands(attachment.handle(0, Submit(1, "", message("a"))))
    assert commands(attachment.handle(0, Submit(2, "", message("b"))))
    (settle,) = attachment.handle(0, Submit(3, "", message("c")))
    assert isinstance(settle, Settle) and isinstance(settle.outcome, Refused)
    assert (settle.outcome.reason, settle.outcome.retry_after_ms) == (Reason.RATE_LIMITED, 30_000)
    assert commands(attachment.handle(30_000, Submit(4, "", message("c"))))


# ---- the end


def test_the_last_one_to_leave_detaches_after_a_while() -> None:
    attachment = live(7)
    attachment.handle(100, Vacated())
    assert attachment.next_deadline() == 100 + LINGER_MS
    effects = attachment.handle(100 + LINGER_MS, Tick())
    assert [e.command.body for e in commands(effects)] == [Detach()]
    assert effects[-1] == Over() and attachment.live_epoch == 0


def test_who_comes_back_in_time_finds_the_attachment_live() -> None:
    attachment = live(7)
    attachment.handle(100, Vacated())
    assert attachment.handle(200, Occupied()) == []
    assert attachment.handle(10_000, Tick()) == [] and attachment.live_epoch == 7


def test_a_command_without_an_answer_keeps_the_attachment_for_a_while() -> None:
    attachment = live(7)
    attachment.handle(0, Submit(1, "", message("m1")))
    attachment.handle(1, Vacated())
    assert attachment.handle(1 + LINGER_MS, Tick()) == []
    assert attachment.handle(1 + ABANDON_MS, Tick())[-1] == Over()


# ---- many at once, planned moves, evictions


def test_of_many_that_were_lost_at_once_some_look_later() -> None:
    attachment = live()
    lost = placement(7).incarnation
    assert attachment.handle(1000, NodeLost(lost, True, wait_ms=50)) == []
    assert attachment.live_epoch == 0 and attachment.next_deadline() == 1050
    assert attachment.handle(1049, Tick()) == []
    assert attachment.handle(1050, Tick()) == [ResolveManager(8)]


def test_who_waits_for_its_turn_follows_a_move_at_once() -> None:
    attachment = live()
    attachment.handle(1000, NodeLost(placement(7).incarnation, True, wait_ms=50))
    (asked,) = commands(attachment.handle(1001, PlacementMoved(placement(9, "n2"))))
    assert asked.command.body == Attach(1) and asked.placement.node_id == "n2"
    assert attachment.next_deadline() == 1001 + ATTACH_ANSWER_MS


def test_after_a_planned_move_the_gap_counts_from_when_the_old_manager_let_go() -> None:
    attachment = live()
    moved = ManagerLost(Reason.MANAGER_MOVED.value, 0)
    assert attachment.handle(1000, answer(7, 0, moved)) == [ResolveManager(8)]
    (asked,) = commands(attachment.handle(1040, PlacementMoved(placement(9, "n2"))))
    assert asked.command.body == Attach(40)
    # The registry's answer to the question that was asked meanwhile changes nothing.
    assert attachment.handle(1041, Resolved(placement(9, "n2"))) == []


@pytest.mark.parametrize("pushed", [True, False])
def test_an_evicted_user_loses_every_session_and_is_never_attached_again(pushed: bool) -> None:
    attachment = live()
    attachment.handle(0, Submit(1, "", message("m1")))
    told = answer(7, 0, ManagerLost(Reason.USER_EVICTED.value, 0))
    effects = attachment.handle(10, Evicted() if pushed else told)
    settled, ended, detach, over = effects
    assert isinstance(settled, Settle) and isinstance(settled.outcome, Refused)
    assert settled.outcome.reason is Reason.USER_EVICTED
    assert ended == EndSessions(Reason.USER_EVICTED) and over == Over()
    assert isinstance(detach, SendCommand) and detach.command.body == Detach()
    assert attachment.state is AttachmentState.IDLE
    for late in (PlacementMoved(placement(9)), Resolved(placement(9)), Tick()):
        assert attachment.handle(20_000, late) == []


def test_news_of_an_earlier_manager_s_eviction_changes_nothing() -> None:
    attachment = live()
    assert attachment.handle(0, answer(6, 0, ManagerLost("USER_EVICTED", 0))) == []
    assert attachment.live_epoch == 7


# ---- client ids


def announced(effects: list[Effect]) -> list[tuple[str, int]]:
    """What is announced, with the number of the marker behind it."""
    sent = [command.command for command in commands(effects)]
    return [
        (command.body.client_id, marker.command_id)
        for command, marker in itertools.pairwise(sent)
        if isinstance(command.body, AnnounceClient) and marker.body == Attach()
    ]


def marked(marker: int, epoch: int = 7) -> Answered:
    return answer(epoch, marker, Attached(StreamId("s1"), 5, 1))


def test_a_client_is_announced_when_attached_and_before_waiting_commands() -> None:
    attachment = fresh()
    assert attachment.handle(0, ClientCame("tab")) == []
    attachment.handle(0, Submit(1, "", message("m1")))
    effects = attach(attachment, 7)
    assert [name for name, _ in announced(effects)] == ["tab"]
    last = effects[-1]
    assert isinstance(last, SendCommand) and last.command.body == message("m1")


def test_only_what_no_manager_heard_of_is_announced_to_the_next_one() -> None:
    attachment = live()
    markers = [announced(attachment.handle(0, ClientCame(name)))[0][1] for name in "abc"]
    assert attachment.handle(0, marked(markers[0])) == []
    attachment.handle(0, ClientLeft("c"))
    attachment.handle(0, answer(7, 0, ManagerLost("LEASE_EXPIRED", 0)))
    assert attachment.handle(0, marked(markers[2])) == []
    ((name, marker),) = announced(attach(attachment, 8))
    assert name == "b" and marker > max(markers)


def test_a_newer_client_elsewhere_ends_the_one_here_unless_that_is_newer_still() -> None:
    attachment = live()
    taken = answer(7, 0, ClientTaken("tab"))
    assert attachment.handle(0, taken) == []
    ((_, marker),) = announced(attachment.handle(0, ClientCame("tab")))
    assert attachment.handle(0, taken) == []
    attachment.handle(0, marked(marker))
    assert attachment.handle(0, taken) == [EndClient("tab")]
