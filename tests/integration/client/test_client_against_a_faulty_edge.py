"""The client over real WebSockets: what it shows is whole and in order, whatever the edge does."""

import asyncio
import json
import time
from typing import Any

import pytest

from steward import Client
from steward.client.checks import check_stream
from steward.client.commands import Opened, SessionState
from steward.client.events import ClientClosed, Event
from steward.errors import Reason, StewardError
from steward.model.keys import StreamId, StreamPosition

pytestmark = pytest.mark.asyncio

Edge = Any  # ScriptedEdge of conftest.py, which importlib mode can't import by name.
Fault = Any


@pytest.fixture
def fault() -> Fault:
    """The Fault class of conftest.py."""
    import sys

    module = next(m for m in sys.modules.values() if hasattr(m, "ScriptedEdge"))
    return module.Fault  # type: ignore[attr-defined]


def fill(edge: Edge, count: int) -> None:
    for number in range(count):
        edge.append("custom", {"name": "n", "value": number})


async def take(client: Client, count: int) -> list[Event]:
    async with asyncio.timeout(8):
        return [await anext(client) for _ in range(count)]


def sequences(events: list[Event]) -> list[int]:
    return [event.sequence for event in events]


def findings(events: list[Event], **kw: Any) -> list[str]:
    return [str(f) for f in check_stream([json.loads(event.raw) for event in events], **kw)]


async def test_a_question_gets_its_run_and_its_response(edge: Edge) -> None:
    async with Client(edge.url, token="good") as client:
        run = await client.ask("Which region sold the most?")
        events = [event async for event in run]
        everything = await take(client, 7)
    kinds = [event.type for event in events]
    assert kinds == ["agent_started", "agent_thinking", *["agent_text"] * 3, "agent_completed"]
    assert (run.outcome, run.response) == ("success", "South sold the most.")
    assert run.run_id == run.accepted.run_id == "r1"
    assert sequences(everything) == [1, 2, 3, 4, 5, 6, 7]
    assert findings(everything) == []


async def test_runs_of_two_questions_do_not_mix(edge: Edge) -> None:
    async with Client(edge.url, token="good") as client:
        first, second = await asyncio.gather(client.ask("one"), client.ask("two"))
        assert await first.wait() == await second.wait() == "South sold the most."
        assert first.run_id != second.run_id
        events = await take(client, 14)
    assert {event.run_id for event in events} == {first.run_id, second.run_id}


async def test_a_cut_connection_is_resumed_without_gap_or_repeat(edge: Edge, fault: Fault) -> None:
    fill(edge, 30)
    edge.faults.extend([fault(cut_after=7), fault(cut_after=1), fault(close_after=(5, 4004))])
    async with Client(edge.url, token="good", after=0) as client:
        events = await take(client, 30)
    assert sequences(events) == list(range(1, 31))
    assert findings(events) == []
    assert [u.query.get("after") for u in edge.upgrades] == ["0", "7", "8", "13"]
    assert {u.query.get("stream") for u in edge.upgrades[1:]} == {"s1"}


async def test_when_an_edge_is_gone_the_session_goes_on_at_the_next_one(
    edge: Edge, fault: Fault
) -> None:
    fill(edge, 12)
    nobody = "http://127.0.0.1:9"
    edge.faults.append(fault(cut_after=5))
    async with Client([edge.url, nobody], token="good", after=0) as client:
        events = await take(client, 12)
    assert sequences(events) == list(range(1, 13))
    assert [u.query.get("after") for u in edge.upgrades] == ["0", "5"]


async def test_repeated_events_are_shown_once(edge: Edge, fault: Fault) -> None:
    fill(edge, 10)
    edge.faults.append(fault(repeat=frozenset({1, 4, 10})))
    async with Client(edge.url, token="good", after=0) as client:
        assert sequences(await take(client, 10)) == list(range(1, 11))
    assert len(edge.upgrades) == 1


async def test_a_skipped_event_forces_a_resume(edge: Edge, fault: Fault) -> None:
    fill(edge, 10)
    edge.faults.append(fault(skip=frozenset({6})))
    async with Client(edge.url, token="good", after=0) as client:
        assert sequences(await take(client, 10)) == list(range(1, 11))
    assert [u.query["after"] for u in edge.upgrades] == ["0", "5"]


async def test_an_event_of_a_lower_epoch_is_not_shown(edge: Edge, fault: Fault) -> None:
    fill(edge, 2)
    zombie = edge.events[-1] | {"sequence": 3, "epoch": 6}
    async with Client(edge.url, token="good", after=0) as client:
        await take(client, 2)
        for connection in list(edge.connections):
            await connection.frame(zombie)
        edge.append("custom", {"name": "real", "value": 1})
        (third,) = await take(client, 1)
    assert (third.sequence, third.epoch, third.data["name"]) == (3, 7, "real")
    assert len(edge.upgrades) == 2


async def test_going_away_is_obeyed(edge: Edge, fault: Fault) -> None:
    fill(edge, 4)
    edge.faults.append(fault(going_away_after=(2, 300), close_after=(4, 4002)))
    async with Client(edge.url, token="good", after=0) as client:
        await take(client, 4)
        edge.append("custom", {"name": "later", "value": 1})
        assert sequences(await take(client, 1)) == [5]
    waited = edge.upgrades[1].at - edge.upgrades[0].at
    assert 0.29 <= waited < 1.5


async def test_retry_after_is_obeyed(edge: Edge, fault: Fault) -> None:
    body = {"reason": "EDGE_DRAINING", "message": "draining"}
    edge.faults.append(fault(refuse=(503, body, {"Retry-After": "1"})))
    edge.faults.append(fault(refuse=(429, body | {"retry_after_ms": 200}, {"Retry-After": "9"})))
    async with Client(edge.url, token="good") as client:
        assert client.state is SessionState.OPEN
    first, second, third = (u.at for u in edge.upgrades)
    assert second - first >= 1.0
    assert 0.2 <= third - second < 2.0


async def test_an_expired_token_is_replaced_once(edge: Edge) -> None:
    tokens = iter(["stale", "good"])

    async def provide() -> str:
        return next(tokens)

    async with Client(edge.url, token_provider=provide):
        pass
    assert [u.token for u in edge.upgrades] == ["stale", "good"]


async def test_a_token_that_stays_bad_ends_the_session(edge: Edge) -> None:
    async def provide() -> str:
        return "stale"

    with pytest.raises(StewardError) as caught:
        async with Client(edge.url, token_provider=provide):
            pass
    assert caught.value.reason is Reason.TOKEN_EXPIRED
    assert len(edge.upgrades) == 2


async def test_a_fixed_token_is_not_tried_twice(edge: Edge) -> None:
    with pytest.raises(StewardError) as caught:
        async with Client(edge.url, token="stale"):
            pass
    assert (caught.value.reason, caught.value.message) == (
        Reason.TOKEN_EXPIRED,
        "the token expired",
    )
    assert len(edge.upgrades) == 1


async def test_the_token_is_refreshed_on_the_open_socket(edge: Edge) -> None:
    from datetime import timedelta

    edge.expires = timedelta(seconds=1)
    edge.tokens = {"t1", "t2"}
    tokens = iter(["t1", "t2"])

    async def provide() -> str:
        return next(tokens)

    async with Client(edge.url, token_provider=provide):
        assert (await edge.wait_for("auth"))["token"] == "t2"
    assert len(edge.upgrades) == 1


async def test_close_4001_means_a_new_token(edge: Edge, fault: Fault) -> None:
    fill(edge, 2)
    edge.tokens = {"t1", "t2"}
    edge.faults.append(fault(close_after=(1, 4001)))
    tokens = iter(["t1", "t2"])

    async def provide() -> str:
        return next(tokens)

    async with Client(edge.url, token_provider=provide, after=0) as client:
        assert sequences(await take(client, 2)) == [1, 2]
    assert [u.token for u in edge.upgrades] == ["t1", "t2"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (4500, Reason.TOKEN_INVALID),
        (4502, Reason.PROTOCOL_VIOLATION),
        (4503, Reason.USER_EVICTED),
        (4504, Reason.CONNECTION_REPLACED),
        (1009, Reason.MESSAGE_TOO_LARGE),
    ],
)
async def test_codes_that_stop_end_the_stream(
    edge: Edge, fault: Fault, code: int, reason: Reason
) -> None:
    fill(edge, 3)
    edge.faults.append(fault(close_after=(3, code)))
    async with Client(edge.url, token="good", after=0) as client:
        await take(client, 3)
        with pytest.raises(StewardError) as caught:
            await take(client, 1)
        assert caught.value.reason is reason
        with pytest.raises(StewardError):
            await client.send("too late")
        assert client.state is SessionState.CLOSED
    assert len(edge.upgrades) == 1


async def test_a_message_without_answer_is_sent_again_under_its_id(
    edge: Edge, fault: Fault
) -> None:
    edge.faults.append(fault(swallow_accepted=True))
    async with Client(edge.url, token="good") as client:
        run = await client.ask("Which region?", id="m-1")
        assert await run.wait() == "South sold the most."
        events = await take(client, 7)
    sent = [frame["id"] for frame in edge.received if frame["type"] == "user_message"]
    assert sent == ["m-1", "m-1"]
    assert run.accepted.duplicate and run.accepted.sequence == 1
    assert sequences(events) == [1, 2, 3, 4, 5, 6, 7]


async def test_a_repeated_id_answers_with_the_first_run(edge: Edge) -> None:
    async with Client(edge.url, token="good") as client:
        first = await client.send("hello", id="m-1")
        again = await client.send("something else", id="m-1")
    assert (first.duplicate, again.duplicate) == (False, True)
    assert (first.run_id, first.sequence) == (again.run_id, again.sequence)


async def test_an_old_question_says_where_its_run_is(edge: Edge) -> None:
    async with Client(edge.url, token="good") as client:
        await (await client.ask("hello", id="m-1")).wait()
    async with Client(edge.url, token="good") as client:
        with pytest.raises(StewardError, match="after=0") as caught:
            await client.ask("hello", id="m-1")
    assert caught.value.reason is Reason.NOT_FOUND


async def test_a_refused_message_raises_its_reason(edge: Edge) -> None:
    async with Client(edge.url, token="good") as client:
        with pytest.raises(StewardError) as caught:
            await client.send("refuse me")
    assert (caught.value.reason, caught.value.retry_after_ms) == (Reason.RATE_LIMITED, 700)


async def test_a_message_over_the_limit_never_leaves(edge: Edge) -> None:
    async with Client(edge.url, token="good") as client:
        with pytest.raises(StewardError) as caught:
            await client.send("x" * 70_000)
        assert caught.value.reason is Reason.MESSAGE_TOO_LARGE
        await client.send("small")
    assert len(edge.received) == 1


async def test_frames_that_are_no_frames_force_a_new_connection(edge: Edge, fault: Fault) -> None:
    edge.faults.append(fault(before_ready=["not JSON"]))
    edge.faults.append(fault(before_ready=["[1]"]))
    async with Client(edge.url, token="good") as client:
        assert client.state is SessionState.OPEN
    assert len(edge.upgrades) == 3


async def test_a_silent_server_is_left(edge: Edge, fault: Fault) -> None:
    edge.heartbeat_seconds = 0.1
    async with Client(edge.url, token="good", after=0) as client:
        edge.heartbeat_seconds = 15.0
        await edge.wait_for_upgrades(2)
        fill(edge, 1)
        for connection in list(edge.connections):
            await connection.event(edge.events[0])
        assert sequences(await take(client, 1)) == [1]


async def test_a_heartbeat_that_is_ahead_forces_a_resume(edge: Edge) -> None:
    async with Client(edge.url, token="good") as client:
        fill(edge, 1)  # Stored, but never sent on this connection.
        for connection in list(edge.connections):
            await connection.frame({"type": "heartbeat", "sequence": 1})
        assert sequences(await take(client, 1)) == [1]
    assert [u.query.get("after") for u in edge.upgrades] == [None, "0"]


async def test_reset_drops_what_is_held_and_starts_at_the_oldest(edge: Edge) -> None:
    fill(edge, 9)
    edge.oldest = 4
    seen: list[Opened] = []
    elsewhere = StreamPosition(StreamId("s0"), 40)  # type: ignore[arg-type]
    async with Client(edge.url, token="good", after=elsewhere, on_opened=seen.append) as client:
        assert sequences(await take(client, 6)) == [4, 5, 6, 7, 8, 9]
        assert client.position == ("s1", 9)
    assert [opened.resume for opened in seen] == ["reset"]


async def test_what_was_not_read_before_a_reset_is_dropped(edge: Edge) -> None:
    fill(edge, 5)
    again = asyncio.Event()

    def on_opened(opened: Opened) -> None:
        if opened.resume == "reset":
            again.set()

    async with Client(edge.url, token="good", after=0, on_opened=on_opened) as client:
        await client.send("hello")  # Its answer comes after the five.
        edge.stream_id = "s2"
        edge.events.clear()
        fill(edge, 2)
        for connection in list(edge.connections):
            connection.cut()
        async with asyncio.timeout(5):
            await again.wait()
        events = await take(client, 2)
    assert [(event.stream_id, event.sequence) for event in events] == [("s2", 1), ("s2", 2)]


async def test_a_reset_ends_the_runs_that_are_watched(edge: Edge) -> None:
    edge.answer = []
    async with Client(edge.url, token="good", after=0) as client:
        run = await client.ask("hello")
        await run.wait()
        edge.messages.clear()
        await edge.publish("user_message", {"id": "m2", "content": "x"}, "r9")
        other = asyncio.create_task(client.ask("later", id="m2"))
        await edge.wait_for("user_message", 2)
        watched = await other
        edge.stream_id = "s2"
        edge.events.clear()
        for connection in list(edge.connections):
            connection.cut()
        with pytest.raises(StewardError) as caught:
            async with asyncio.timeout(5):
                while True:
                    await anext(watched)
    assert caught.value.reason is Reason.POSITION_COMPACTED


async def test_cancel_answer_and_ack_are_written(edge: Edge) -> None:
    async with Client(edge.url, token="good", client_id="tab-1") as client:
        await client.cancel("r7")
        await client.cancel(thread_id="main")
        await client.answer("q1", {"choice": 2})
        await client.ack(4, "9f86")
        await edge.wait_for("ack")
    assert edge.received == [
        {"type": "cancel", "run_id": "r7"},
        {"type": "cancel", "thread_id": "main"},
        {"type": "user_input", "request_id": "q1", "value": {"choice": 2}},
        {"type": "ack", "sequence": 4, "digest": "9f86"},
    ]
    assert edge.upgrades[0].query == {"client": "tab-1"}


async def test_what_was_written_is_sent_before_the_close(edge: Edge) -> None:
    async with Client(edge.url, token="good") as client:
        await client.cancel("r7")
    assert await edge.wait_for("cancel") == {"type": "cancel", "run_id": "r7"}


async def test_closing_ends_readers_and_senders(edge: Edge, fault: Fault) -> None:
    client = Client(edge.url, token="good")
    async with client:
        run = await client.ask("hello")
        await run.wait()
        reader = asyncio.create_task(_read_all(client))
    assert sequences(await reader) == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(ClientClosed):
        await client.send("too late")
    await client.close()


async def _read_all(client: Client) -> list[Event]:
    return [event async for event in client]


async def test_a_slow_reader_loses_nothing(edge: Edge) -> None:
    fill(edge, 400)
    async with Client(edge.url, token="good", after=0, buffer=8) as client:
        events = []
        async with asyncio.timeout(20):
            while len(events) < 400:
                events.append(await anext(client))
                if len(events) % 50 == 0:
                    await asyncio.sleep(0.02)
    assert sequences(events) == list(range(1, 401))
    assert len(edge.upgrades) == 1


async def test_a_reader_slower_than_the_heartbeats_loses_nothing(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than two heartbeats: only a connection that is over could give the reader up.
    monkeypatch.setattr("steward.client.client.READER_S", 0.5)
    fill(edge, 60)
    edge.heartbeat_seconds = 0.1
    async with Client(edge.url, token="good", after=0, buffer=4) as client:
        events = await take(client, 2)
        await edge.wait_for_upgrades(5)  # What we did not read ended four connections.
        events += await take(client, 58)
    assert sequences(events) == list(range(1, 61))


async def test_asking_alone_is_not_held_up_by_the_unread_stream(edge: Edge) -> None:
    edge.answer = ["x"] * 50
    started = time.monotonic()
    async with Client(edge.url, token="good", buffer=16) as client:
        for _ in range(3):
            assert await (await client.ask("hello")).wait() == "x" * 50
        with pytest.raises(StewardError) as caught:
            await take(client, 200)
    assert caught.value.reason is Reason.SLOW_CONSUMER
    assert time.monotonic() - started < 5


async def test_a_run_that_was_forgotten_holds_up_nobody(edge: Edge) -> None:
    edge.answer = ["x"] * 50
    async with Client(edge.url, token="good", buffer=16) as client:
        for _ in range(2):
            await client.ask("never looked at")
        async with asyncio.timeout(5):
            assert await (await client.ask("hello")).wait() == "x" * 50


async def test_nobody_there_is_said_with_its_cause(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steward.client.client.OPEN_S", 0.3)
    with pytest.raises(StewardError, match=r"127\.0\.0\.1:1 ") as caught:
        async with Client("http://127.0.0.1:1", token="good"):
            pass
    assert caught.value.reason is Reason.MANAGER_UNAVAILABLE


async def test_a_provider_that_fails_is_asked_again(edge: Edge) -> None:
    calls = 0

    async def provide() -> str:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise RuntimeError("the vault is sealed")
        return "good"

    async with Client(edge.url, token_provider=provide):
        assert calls == 3


async def test_a_client_needs_exactly_one_kind_of_token(edge: Edge) -> None:
    with pytest.raises(ValueError, match="either token or token_provider"):
        Client(edge.url)
