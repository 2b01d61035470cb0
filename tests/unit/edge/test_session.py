"""`EdgeSession`: first `ready`, then every event once and in order, whatever happens around it."""

import random
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.core import session as session_module
from edge.core.batch import EventBatch
from edge.core.commands import Accepted, Refused, SubmitMessage
from edge.core.frames import CLOSE_BAD_TEXT, CLOSE_TOO_LARGE
from edge.core.resume import ResumePoint, StreamHead
from edge.core.server_messages import Limits
from edge.core.session import (
    ATTACH_MS,
    CLOSE_MS,
    MOST_BUFFERED_BYTES,
    MOST_EARLY_BYTES,
    MOST_EARLY_FRAMES,
    EdgeSession,
    SessionState,
)
from edge.core.session_values import (
    Abort,
    AttachFailed,
    BinaryReceived,
    CheckToken,
    Close,
    CommandSettled,
    Effect,
    End,
    Leave,
    PageRead,
    PeerLeft,
    ReadFailed,
    ReadPage,
    Report,
    Send,
    SendEvents,
    SendPing,
    SessionStart,
    StreamAttached,
    SubmitCommand,
    TextReceived,
    Tick,
    TokenChecked,
    Violated,
)
from steward.errors import Reason, StewardError
from steward.model.identity import Identity
from steward.model.keys import ConnectionId, Epoch, NodeId, StreamId, UserKey
from steward.model.violations import ViolationKind

ALICE = UserKey("default", "alice")
BEAT = 15_000
START = SessionStart(
    connection_id=ConnectionId("c-1"),
    user=ALICE,
    point=ResumePoint(),
    limits=Limits(1000, 60, 8, BEAT),
    issued_at_ms=1_000,
    expires_ms=10_000_000,
    expires_text="2026-11-24T00:00:00.000Z",
)


def head(sequence: int, oldest: int = 1, stream: str = "s1", epoch: int = 7) -> StreamHead:
    return StreamHead(StreamId(stream), sequence, oldest, NodeId("node-1"), Epoch(epoch))


def events(first: int, last: int, size: int = 1) -> EventBatch:
    return EventBatch(first, [b"%0*d" % (size, n) for n in range(first, last + 1)])


def opened(sequence: int, after: int | None = None, **changes: Any) -> EdgeSession:
    session = EdgeSession(0, replace(START, point=ResumePoint(after), **changes))
    session.handle(0, StreamAttached(head(sequence)))
    return session


def messages(effects: list[Effect]) -> list[dict[str, Any]]:
    return [orjson.loads(e.payload) for e in effects if isinstance(e, Send)]


def closes(effects: list[Effect]) -> list[int]:
    return [e.code for e in effects if isinstance(e, Close)]


def sent(effects: list[Effect]) -> list[int]:
    return [int(event) for e in effects if isinstance(e, SendEvents) for event in e.batch.events]


def user_message(id: str = "m1") -> TextReceived:
    return TextReceived(orjson.dumps({"type": "user_message", "id": id, "content": "hi"}))


# ---- ready and catching up


def test_ready_is_the_first_message_and_says_what_the_contract_says() -> None:
    session = EdgeSession(0, START)
    effects = session.handle(5, StreamAttached(head(10)))
    assert messages(effects) == [
        {
            "type": "ready",
            "connection_id": "c-1",
            "tenant_id": "default",
            "user_id": "alice",
            "stream_id": "s1",
            "sequence": 10,
            "resume": "new",
            "manager": {"node_id": "node-1", "epoch": 7},
            "token_expires_at": "2026-11-24T00:00:00.000Z",
            "limits": {
                "max_message_bytes": 1000,
                "messages_per_minute": 60,
                "max_connections": 8,
                "heartbeat_seconds": 15,
            },
        }
    ]
    assert session.state is SessionState.LIVE and session.offer(events(11, 11))


def test_missing_events_come_from_the_log_before_live_ones() -> None:
    session = EdgeSession(0, replace(START, point=ResumePoint(4, StreamId("s1"))))
    effects = session.handle(0, StreamAttached(head(6)))
    assert effects[1:] == [ReadPage(4, 6)]
    assert not session.offer(events(7, 8)) and session.repair(0, events(7, 8)) == []
    effects = session.handle(0, PageRead(events(5, 6)))
    assert sent(effects) == [5, 6, 7, 8] and session.state is SessionState.LIVE


def test_a_replay_is_paged_and_one_page_is_under_way_at_a_time() -> None:
    session = opened(100, after=0)
    assert session.handle(0, PageRead(events(1, 40)))[1:] == [ReadPage(40, 100)]
    assert session.repair(0, events(101, 101)) == []
    effects = session.handle(0, PageRead(events(41, 100)))
    assert sent(effects) == [*range(41, 102)]


def test_a_full_buffer_of_live_events_is_dropped_and_read_from_the_log_again() -> None:
    session = opened(10, after=0)
    big = EventBatch(11, [b"x" * (MOST_BUFFERED_BYTES + 1)])
    assert session.repair(0, big) == []
    session.repair(0, events(12, 12))
    effects = session.handle(0, PageRead(events(1, 10)))
    assert sent(effects) == [*range(1, 11)] and effects[-1] == ReadPage(10, 11)
    assert sent(session.handle(0, PageRead(events(11, 11)))) == [11, 12]


def test_a_hole_in_the_live_stream_is_filled_from_the_log() -> None:
    session = opened(10)
    assert not session.offer(events(12, 13))
    assert session.repair(0, events(12, 13)) == [ReadPage(10, 11)]
    assert sent(session.handle(0, PageRead(events(11, 11)))) == [11, 12, 13]


def test_repeated_live_events_are_not_sent_again() -> None:
    session = opened(10)
    assert session.offer(events(11, 12))
    assert session.repair(0, events(11, 12)) == []
    assert sent(session.repair(0, events(12, 14))) == [13, 14]


def test_a_reattach_reads_what_passed_by_and_brings_no_second_ready() -> None:
    session = opened(10)
    session.offer(events(11, 11))
    assert session.handle(0, StreamAttached(head(11, epoch=8))) == []
    assert session.state is SessionState.LIVE
    assert session.handle(0, StreamAttached(head(15, epoch=9))) == [ReadPage(11, 15)]
    session.repair(0, events(16, 16))
    assert sent(session.handle(0, PageRead(events(12, 15)))) == [12, 13, 14, 15, 16]


def test_another_stream_or_a_shorter_one_ends_the_connection() -> None:
    for other in (head(20, stream="s2"), head(8)):
        session = opened(10)
        assert closes(session.handle(0, StreamAttached(other))) == [4006]


def test_a_stream_that_went_back_is_a_breach_and_an_erased_one_is_none() -> None:
    session = opened(10)
    session.offer(events(11, 12))
    effects = session.handle(0, StreamAttached(head(11)))
    assert isinstance(effects[0], Report)
    assert effects[0].kind is ViolationKind.STREAM_WENT_BACK
    assert "12" in effects[0].evidence and "11" in effects[0].evidence
    assert closes(effects) == [4006]
    erased = opened(10).handle(0, StreamAttached(head(3, stream="s2")))
    assert not [e for e in erased if isinstance(e, Report)]


def test_a_message_that_names_a_user_is_refused_and_put_on_record() -> None:
    session = opened(0)
    frame = orjson.dumps({"type": "user_message", "id": "m1", "content": "x", "user_id": "bob"})
    effects = session.handle(0, TextReceived(frame))
    assert effects[0] == Report(
        ViolationKind.FOREIGN_USER, "user_id comes from the token; leave it out"
    )
    assert [m["ref"] for m in messages(effects)] == ["m1"]
    assert not [e for e in session.handle(0, TextReceived(b"?")) if isinstance(e, Report)]


def test_a_page_that_does_not_continue_ends_the_connection() -> None:
    session = opened(10, after=0)
    assert closes(session.handle(0, PageRead(events(3, 4)))) == [1011]
    session = opened(10, after=0)
    assert closes(session.handle(0, ReadFailed())) == [1011]
    session = opened(10, after=0)
    assert closes(session.handle(0, ReadFailed(Reason.MANAGER_UNAVAILABLE))) == [4006]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), after=st.sampled_from([None, 0, 3, 9]))
def test_any_interleaving_of_live_pages_and_reattaches_is_gapless(
    seed: int, after: int | None
) -> None:
    """A log that grows, live batches that come late, twice or never, pages of any length."""
    dice = random.Random(seed)
    stored = 10
    start = replace(START, point=ResumePoint(after))
    session = EdgeSession(0, start)
    seen: list[int] = []
    wanted: list[ReadPage] = []

    def take(effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SendEvents):
                seen.extend(int(event) for event in effect.batch.events)
            elif isinstance(effect, ReadPage):
                wanted.append(effect)
            assert not isinstance(effect, Close)

    def deliver(batch: EventBatch) -> None:
        if session.offer(batch):
            seen.extend(int(event) for event in batch.events)
        else:
            take(session.repair(0, batch))

    take(session.handle(0, StreamAttached(head(stored))))
    for _ in range(60):
        match dice.randrange(5):
            case 0 | 1:
                first, stored = stored + 1, stored + dice.randint(1, 3)
                if dice.random() < 0.8:
                    deliver(events(first, stored))
            case 2:
                first = dice.randint(1, stored)
                deliver(events(first, dice.randint(first, min(first + 3, stored))))
            case 3 if wanted:
                page = wanted.pop()
                last = dice.randint(page.after + 1, page.until)
                take(session.handle(0, PageRead(events(page.after + 1, last))))
            case 4 if dice.random() < 0.3:
                take(session.handle(0, StreamAttached(head(stored))))
    take(session.handle(0, StreamAttached(head(stored))))
    while wanted:
        page = wanted.pop()
        take(session.handle(0, PageRead(events(page.after + 1, page.until))))
    begin = 11 if after is None else after + 1
    assert seen == list(range(begin, stored + 1))
    assert session.state is SessionState.LIVE


# ---- frames of the client


def test_frames_before_ready_are_kept_in_order_and_bounded_in_number() -> None:
    session = EdgeSession(0, START)
    for n in range(MOST_EARLY_FRAMES):
        assert session.accepts_frames
        assert session.handle(0, user_message(f"m{n}")) == []
    assert not session.accepts_frames
    effects = session.handle(0, StreamAttached(head(0)))
    assert isinstance(effects[0], Send) and effects[0].kind == "ready"
    ids = [e.ref for e in effects if isinstance(e, SubmitCommand)]
    assert ids == [f"m{n}" for n in range(MOST_EARLY_FRAMES)] and session.accepts_frames


def test_frames_before_ready_are_bounded_in_bytes() -> None:
    session = EdgeSession(0, START)
    session.handle(0, TextReceived(b"x" * MOST_EARLY_BYTES))
    assert not session.accepts_frames


def test_a_refused_frame_before_ready_is_answered_after_it() -> None:
    session = EdgeSession(0, START)
    assert session.handle(0, TextReceived(b"{")) == []
    kinds = [m["type"] for m in messages(session.handle(0, StreamAttached(head(0))))]
    assert kinds == ["ready", "error"]


def test_a_message_is_submitted_and_its_outcome_told() -> None:
    session = opened(10)
    (effect,) = session.handle(0, user_message())
    assert effect == SubmitCommand("m1", SubmitMessage("m1", b'"hi"', "main"))
    settled = CommandSettled("m1", Accepted("m1", "r1", 11, False, 0))
    assert messages(session.handle(0, settled)) == [
        {"type": "accepted", "id": "m1", "run_id": "r1", "sequence": 11, "duplicate": False}
    ]
    waiting = CommandSettled("m2", Accepted("m2", "r2", 12, True, 3))
    assert messages(session.handle(0, waiting))[0]["queue_position"] == 3
    refused = CommandSettled("m3", Refused(Reason.QUEUE_FULL, "full", 500))
    assert messages(session.handle(0, refused)) == [
        {
            "type": "error",
            "reason": "QUEUE_FULL",
            "message": "full",
            "ref": "m3",
            "retry_after_ms": 500,
        }
    ]


def test_ping_is_answered_with_its_own_t() -> None:
    session = opened(0)
    assert messages(session.handle(0, TextReceived(b'{"type":"ping","t":12.5}'))) == [
        {"type": "pong", "t": 12.5}
    ]


def test_an_ack_never_goes_beyond_what_was_sent() -> None:
    session = opened(10)
    for sequence, expected in ((10, 10), (5, 10), (99, 10)):
        session.handle(0, TextReceived(b'{"type":"ack","sequence":%d}' % sequence))
        assert session.acknowledged == expected


def test_the_tenth_violation_in_a_minute_closes() -> None:
    session = opened(0)
    for _ in range(9):
        effects = session.handle(0, BinaryReceived())
        assert [m["reason"] for m in messages(effects)] == ["PROTOCOL_VIOLATION"]
        assert not closes(effects)
    assert closes(session.handle(59_999, TextReceived(b"?"))) == [4502]


def test_violations_are_forgotten_after_a_minute() -> None:
    session = opened(0)
    for minute in range(3):
        for _ in range(9):
            assert not closes(session.handle(minute * 60_000, BinaryReceived()))
    assert session.state is SessionState.LIVE


def test_only_persistent_abuse_of_the_rate_limit_closes() -> None:
    session = opened(0)
    refused = CommandSettled("m", Refused(Reason.RATE_LIMITED, "slow", 1000))
    for _ in range(99):
        assert not closes(session.handle(0, refused))
    assert closes(session.handle(0, refused)) == [4005]


def test_framing_violations_close_with_the_codes_of_the_rfc() -> None:
    assert closes(opened(0).handle(0, Violated(CLOSE_BAD_TEXT, "x"))) == [1007]
    effects = opened(0).handle(0, Violated(CLOSE_TOO_LARGE, "x"))
    assert effects == [Close(1009, "MESSAGE_TOO_LARGE")]


# ---- identity


def identity(user: UserKey = ALICE) -> Identity:
    return Identity(user, (), 0, 5_000, "t")


def test_a_new_token_moves_the_expiry() -> None:
    session = opened(0, expires_ms=1_000)
    ask = TextReceived(b'{"type":"auth","token":"t2"}')
    assert session.handle(0, ask) == [CheckToken("t2")]
    assert messages(session.handle(0, ask))[0]["reason"] == "RATE_LIMITED"
    effects = session.handle(0, TokenChecked(identity(), 9_000, "later"))
    assert messages(effects) == [{"type": "authenticated", "token_expires_at": "later"}]
    assert not closes(session.handle(1_000, Tick())) and session.issued_at_ms == 5_000
    assert closes(session.handle(9_000, Tick())) == [4001]


def test_a_bad_or_foreign_token_leaves_the_old_one_in_force() -> None:
    session = opened(0, expires_ms=1_000)
    wrong = StewardError(Reason.TOKEN_INVALID, "no")
    assert messages(session.handle(0, TokenChecked(wrong)))[0]["reason"] == "TOKEN_INVALID"
    foreign = TokenChecked(identity(UserKey("default", "bob")), 9_000, "later")
    assert messages(session.handle(0, foreign))[0]["reason"] == "PERMISSION_DENIED"
    assert closes(session.handle(1_000, Tick())) == [4001]


# ---- time and the end


def test_silence_is_broken_by_a_heartbeat_and_a_ping_together() -> None:
    session = opened(10)
    assert session.next_deadline() == BEAT and session.handle(BEAT - 1, Tick()) == []
    effects = session.handle(BEAT, Tick())
    assert messages(effects) == [{"type": "heartbeat", "sequence": 10}]
    assert SendPing() in effects


def test_a_busy_stream_needs_no_heartbeat_but_its_peer_is_pinged() -> None:
    session = opened(10)
    session.last_out = BEAT - 1
    assert session.handle(BEAT, Tick()) == [SendPing()]


def test_a_peer_that_says_nothing_for_two_periods_is_gone() -> None:
    session = opened(10)
    session.handle(BEAT, Tick())
    assert session.next_deadline() == 2 * BEAT
    assert closes(session.handle(2 * BEAT, Tick())) == [4007]


def test_any_inbound_byte_keeps_a_connection() -> None:
    session = opened(10)
    session.handle(BEAT, Tick())
    session.last_in = BEAT + 1
    assert not closes(session.handle(2 * BEAT, Tick()))


def test_an_event_stream_is_never_taken_for_dead_by_its_silence() -> None:
    session = opened(10, heard=False)
    for beat in range(1, 5):
        session.last_out = (beat - 1) * BEAT
        effects = session.handle(beat * BEAT, Tick())
        assert [e.kind for e in effects if isinstance(e, Send)] == ["heartbeat"]
        assert SendPing() not in effects


def test_without_a_manager_the_connection_ends_after_ten_seconds_without_a_word() -> None:
    session = EdgeSession(0, START)
    assert session.handle(0, AttachFailed(Reason.EPOCH_STALE)) == []
    assert session.next_deadline() == ATTACH_MS and session.handle(ATTACH_MS - 1, Tick()) == []
    assert session.handle(ATTACH_MS, Tick()) == [Close(4006, "MANAGER_UNAVAILABLE")]


def test_a_cluster_without_room_is_said_to_have_none() -> None:
    session = EdgeSession(0, START)
    session.handle(0, AttachFailed(Reason.NO_CAPACITY))
    assert closes(session.handle(ATTACH_MS, Tick())) == [4003]


def test_a_refusal_for_good_ends_at_once() -> None:
    session = EdgeSession(0, START)
    assert closes(session.handle(0, AttachFailed(Reason.USER_EVICTED))) == [4503]


def test_leaving_is_announced_and_then_done() -> None:
    session = opened(10)
    effects = session.handle(100, Leave(Reason.EDGE_DRAINING, 700))
    assert messages(effects) == [{"type": "going_away", "reconnect_after_ms": 700}]
    assert session.next_deadline() == 800
    assert closes(session.handle(800, Tick())) == [4002]


def test_who_leaves_already_is_not_kept_longer_by_another_reason() -> None:
    session = opened(10)
    session.handle(100, Leave(Reason.EDGE_DRAINING, 700))
    assert session.handle(200, Leave(Reason.MANAGER_UNAVAILABLE, 600)) == []
    sooner = session.handle(200, Leave(Reason.MANAGER_UNAVAILABLE, 100))
    assert messages(sooner) == [{"type": "going_away", "reconnect_after_ms": 100}]
    assert closes(session.handle(300, Tick())) == [4006]


def test_nothing_is_sent_before_ready_even_when_leaving() -> None:
    session = EdgeSession(0, START)
    assert session.handle(0, Leave(Reason.EDGE_DRAINING, 10)) == []
    assert session.handle(10, Tick()) == [Close(4002, "EDGE_DRAINING")]


def test_an_aged_connection_is_rotated() -> None:
    session = opened(10, aged_ms=5_000)
    assert session.next_deadline() == 5_000
    assert messages(session.handle(5_000, Tick()))[0]["type"] == "going_away"
    assert closes(session.handle(session.next_deadline(), Tick())) == [4008]


def test_after_the_close_nothing_is_said_and_the_peer_has_a_bound() -> None:
    session = opened(10)
    assert closes(session.handle(0, End(Reason.SLOW_CONSUMER))) == [4004]
    assert not session.offer(events(11, 11)) and session.repair(0, events(11, 11)) == []
    assert session.handle(0, user_message()) == []
    assert session.next_deadline() == CLOSE_MS
    assert session.handle(CLOSE_MS, Tick()) == [Abort()]


def test_a_peer_that_left_gets_no_more_effects() -> None:
    session = opened(10)
    assert session.handle(0, PeerLeft()) == []
    assert session.handle(0, StreamAttached(head(50))) == []


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.TOKEN_REVOKED, 4503),
        (Reason.CONNECTION_REPLACED, 4504),
        (Reason.SLOW_CONSUMER, 4004),
        (Reason.INTERNAL, 1011),
    ],
)
def test_close_codes_are_those_of_the_table(reason: Reason, code: int) -> None:
    assert opened(0).handle(0, End(reason)) == [Close(code, reason.value)]


def test_bounds_are_those_of_the_contract() -> None:
    assert (MOST_EARLY_FRAMES, MOST_EARLY_BYTES) == (32, 256 * 1024)
    assert (ATTACH_MS, session_module.MOST_VIOLATIONS) == (10_000, 10)
