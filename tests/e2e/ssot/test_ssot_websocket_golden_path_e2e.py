"""The golden path from outside: login, ticket, WebSocket, agent, five events, for several users.

Everything is real: `steward up` with its processes, the bundled agent, the public port. The
same tests run against a staging cluster (see conftest). Times are printed, and those that
the product promises are asserted.
"""

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from steward.client.checks import check_stream
from steward.testing.tab import SUBPROTOCOL, Tab, TabClosed, open_tab
from steward.testing.waiting import eventually

QUESTION = "Which region sold the most?"
GOLDEN = ["agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_completed"]

ANSWER_S = 15.0
READY_FIELDS = {
    "type",
    "connection_id",
    "tenant_id",
    "user_id",
    "stream_id",
    "sequence",
    "resume",
    "manager",
    "token_expires_at",
    "limits",
}

LogIn = Callable[[str, str], Any]
GetTicket = Callable[[str, str], Any]


def new_id() -> str:
    """An id that no earlier run of these tests has used; staging remembers them."""
    return f"e2e-{secrets.token_hex(8)}"


def assert_golden(tab: Tab, run_id: str, asked_at: float) -> None:
    """The five events of a run, in order, soon, and never a long silence."""
    events = [
        (event, at)
        for event, at in zip(tab.events, tab.at, strict=True)
        if event.get("run_id") == run_id and event["type"] != "user_message"
    ]
    types = [event["type"] for event, _ in events]
    firsts = [types.index(kind) for kind in GOLDEN]
    assert firsts == sorted(firsts)
    assert (types[0], types[-1]) == (GOLDEN[0], GOLDEN[-1])
    assert events[-1][0]["data"]["outcome"] == "success"
    assert events[-1][0]["data"]["response"]
    times = [asked_at, *(at for _, at in events)]
    silence_s = max(b - a for a, b in itertools.pairwise(times))
    started_s = times[1] - asked_at
    print(f"agent_started after {started_s * 1000:.0f} ms; silence {silence_s * 1000:.0f} ms")


def assert_unbroken(tab: Tab) -> None:
    first = tab.ready["sequence"] + 1
    assert [e["sequence"] for e in tab.events] == list(range(first, first + len(tab.events)))
    assert check_stream(tab.events) == []


# ---- the golden path


@pytest.mark.asyncio
async def test_golden_path_agent_execution_staging_flow(
    running_stage: Any,
    stage: Any,
    http: aiohttp.ClientSession,
    log_in: LogIn,
    get_ticket: GetTicket,
) -> None:
    """Login, ticket, WebSocket, agent, five events: two users at once, nothing crosses."""
    if stage.local is None:
        tokens = stage.tokens("first", "second")
    else:
        codes = [stage.local.login_code, *await stage.codes("second", 1)]
        answers = await asyncio.gather(*(log_in(stage.url, code) for code in codes))
        assert [status for status, _ in answers] == [200, 200]
        tokens = [body["token"] for _, body in answers]
        assert [status for status, _ in [await log_in(stage.url, c) for c in codes]] == [401, 401]

    async def play(token: str) -> Tab:
        ticket = await get_ticket(stage.url, token)
        began = time.monotonic()
        tab = await open_tab(http, stage.url, ticket=ticket)
        connected_s = time.monotonic() - began
        print(f"connected within {connected_s * 1000:.0f} ms")
        asked_at = time.monotonic()
        ended = await tab.ask(new_id(), QUESTION, ANSWER_S)
        assert_golden(tab, ended["run_id"], asked_at)
        assert_unbroken(tab)
        return tab

    tabs = await asyncio.gather(*map(play, tokens))
    assert len({(tab.ready["tenant_id"], tab.ready["user_id"]) for tab in tabs}) == len(tokens)
    assert len({tab.ready["stream_id"] for tab in tabs}) == len(tokens)
    for tab in tabs:
        assert {event["stream_id"] for event in tab.events} == {tab.ready["stream_id"]}
        responses = [e["data"]["response"] for e in tab.events if e["type"] == "agent_completed"]
        assert len(responses) == 1
        await tab.close()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "service",
    ["steward-edge", "steward-auth", "steward-registry", "steward-agent", "steward-log"],
)
async def test_golden_path_agent_execution_staging_flow_is_one_trace(
    service: str, local_stage: Any, http: aiohttp.ClientSession
) -> None:
    """The trace that a client began with its message is seen in every service on the way."""
    (token,) = local_stage.tokens(f"traced-by-{service}")
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    headers = {
        "Authorization": f"Bearer {token}",
        "traceparent": f"00-{trace_id}-{span_id}-01",
    }
    body = {"type": "user_message", "id": "m1", "content": QUESTION}
    async with http.post(f"{local_stage.url}/v1/messages", json=body, headers=headers) as answer:
        assert answer.status == 202
        run_id = (await answer.json())["run_id"]
    tab = await open_tab(http, local_stage.url, token, after=0)
    if not any(event["type"] == "agent_completed" for event in tab.events):
        await tab.until("agent_completed", ANSWER_S, run_id=run_id)
    assert {event["trace"].split("-")[1] for event in tab.events} == {trace_id}
    await tab.close()

    def seen() -> bool:
        spans = local_stage.collector.spans()
        return service in {span.service for span in spans if span.trace_id == trace_id}

    assert await eventually(seen, f"a span of {service}", within_s=3.0)


# ---- connecting


@pytest.mark.asyncio
async def test_golden_path_websocket_staging_connection(
    stage: Any, http: aiohttp.ClientSession, get_ticket: GetTicket
) -> None:
    """Many users at once, by each kind of credential: `ready` first, whole, and within 2 s."""
    tokens = stage.tokens(*(f"visitor-{number}" for number in range(30)))

    async def connect(number: int, token: str) -> tuple[Tab, float]:
        url = stage.urls[number % len(stage.urls)]
        ticket = await get_ticket(url, token) if number % 3 == 1 else ""
        began = time.monotonic()
        if number % 3 == 0:
            tab = await open_tab(http, url, token)
        elif number % 3 == 1:
            tab = await open_tab(http, url, ticket=ticket)
        else:
            protocols = [SUBPROTOCOL, f"steward.bearer.{token}"]
            tab = Tab(await http.ws_connect(f"{url}/v1/connect", protocols=protocols))
            await tab.until("ready", ANSWER_S)
        return tab, time.monotonic() - began

    connected = await asyncio.gather(*(connect(n, token) for n, token in enumerate(tokens)))
    times = sorted(took_s for _, took_s in connected)
    print(
        f"{len(times)} connected: median {times[len(times) // 2] * 1000:.0f} ms, "
        f"longest {times[-1] * 1000:.0f} ms"
    )
    users = set()
    for tab, _ in connected:
        assert tab.frames[0] == tab.ready
        assert tab.ready.keys() == READY_FIELDS
        assert tab.socket.protocol == SUBPROTOCOL
        assert tab.ready["resume"] == "new"
        assert tab.ready["manager"]["node_id"] and tab.ready["manager"]["epoch"] > 0
        users.add((tab.ready["tenant_id"], tab.ready["user_id"]))
        await tab.socket.send_json({"type": "ping", "t": 17})
        assert await tab.until("pong", ANSWER_S) == {"type": "pong", "t": 17}
    assert len(users) == len(tokens)
    await asyncio.gather(*(tab.close() for tab, _ in connected))


@pytest.mark.asyncio
async def test_staging_multi_user_concurrent_websocket_operations(
    stage: Any, http: aiohttp.ClientSession
) -> None:
    """Users with two tabs do different things at the same time; each sees its own, all of it."""
    tokens = stage.tokens(*(f"busy-{number}" for number in range(10)))

    async def work(number: int, token: str) -> tuple[Tab, Tab]:
        marker = f"{number} plus {1000 + number}"
        first = await open_tab(http, stage.urls[0], token)
        second = await open_tab(http, stage.urls[-1], token)
        ids = [new_id() for _ in range(3)]
        thread = new_id()
        await first.send(ids[0], QUESTION)
        await second.send(ids[1], f"What is {marker}?", thread_id=thread)
        await first.send(ids[0], QUESTION)  # The same again: one run.
        await second.socket.send_json({"type": "no such thing"})
        await first.socket.send_json({"type": "ping", "t": number})
        accepted = [await first.until("accepted", ANSWER_S, id=ids[0]) for _ in range(2)]
        assert accepted[0]["run_id"] == accepted[1]["run_id"]
        assert [frame["duplicate"] for frame in accepted] == [False, True]
        error = next((f for f in second.frames if f["type"] == "error"), None)
        error = error or await second.until("error", ANSWER_S)
        assert error["reason"] == "PROTOCOL_VIOLATION"
        for tab in (first, second):
            while [e["type"] for e in tab.events].count("agent_completed") < 2:
                await tab.until("agent_completed", ANSWER_S)
        headers = {"Authorization": f"Bearer {token}"}
        async with http.get(f"{stage.url}/v1/threads/{thread}/events", headers=headers) as answer:
            history = (await answer.json())["events"]
        assert history == [e for e in second.events if e.get("thread_id") == thread]
        assert str(1000 + 2 * number) in history[-1]["data"]["response"]
        return first, second

    pairs = await asyncio.gather(*(work(n, token) for n, token in enumerate(tokens)))
    streams = set()
    for first, second in pairs:
        # The second tab came later; what both were there for is the same, byte for byte.
        assert first.texts[-len(second.texts) :] == second.texts
        assert_unbroken(first)
        assert_unbroken(second)
        streams.add(first.ready["stream_id"])
        assert {event["stream_id"] for event in first.events} == {first.ready["stream_id"]}
    assert len(streams) == len(tokens)
    await asyncio.gather(*(tab.close() for pair in pairs for tab in pair))


# ---- races


@pytest.mark.asyncio
async def test_websocket_handshake_race_condition_prevention(
    stage: Any, http: aiohttp.ClientSession
) -> None:
    """A storm of handshakes whose clients do not wait for `ready`: nothing lost, nothing twice."""
    tokens = stage.tokens(*(f"hasty-{number}" for number in range(10)))
    each = 10

    async def rush(number: int, token: str) -> tuple[Tab, list[str]]:
        # From the first event on: the runs of an early tab may end before a late one is attached.
        tab = await open_tab(http, stage.urls[number % len(stage.urls)], token, wait=False, after=0)
        ids = [new_id() for _ in range(2)]
        await tab.socket.send_json({"type": "ping", "t": number})
        for id in ids:
            await tab.send(id, QUESTION, thread_id=id)
        return tab, ids

    rushed = await asyncio.gather(
        *(rush(number, token) for token in tokens for number in range(each))
    )
    runs: dict[str, list[str]] = {}
    for tab, ids in rushed:
        seen: list[str] = []
        while len(seen) < 3:
            frame = await tab.read(ANSWER_S)
            if frame["type"] in ("pong", "accepted"):
                seen.append(frame["type"] if frame["type"] == "pong" else frame["id"])
                if frame["type"] == "accepted":
                    assert not frame["duplicate"]
                    runs.setdefault(tab.ready["user_id"], []).append(frame["run_id"])
            else:
                assert frame["type"] in {"ready", "error"} or "event_id" in frame
                assert frame["type"] != "error", frame
        assert [frame["type"] for frame in tab.frames].index("ready") == 0
        # The pong may overtake, since it needs no manager; the messages keep their order.
        assert [id for id in seen if id != "pong"] == ids
    assert len(runs) == len(tokens)
    assert all(len(set(of_user)) == len(of_user) == 2 * each for of_user in runs.values())
    places = {(t.ready["user_id"], *t.ready["manager"].values()) for t, _ in rushed}
    assert len(places) == len(tokens), "one manager per user, however many ask at once"

    # All tabs of a user converge on one stream without a hole.
    for user, of_user in runs.items():
        tabs = [tab for tab, _ in rushed if tab.ready["user_id"] == user]
        for tab in tabs:
            while {e["run_id"] for e in tab.events if e["type"] == "agent_completed"} < set(
                of_user
            ):
                await tab.until("agent_completed", ANSWER_S)
        by_sequence: dict[int, str] = {}
        for tab in tabs:
            numbers = [event["sequence"] for event in tab.events]
            assert numbers == list(range(1, 1 + len(numbers)))
            for event, text in zip(tab.events, tab.texts, strict=True):
                assert by_sequence.setdefault(event["sequence"], text) == text
    await asyncio.gather(*(tab.close() for tab, _ in rushed))


@pytest.mark.asyncio
async def test_websocket_handshake_race_condition_prevention_of_one_client_id(
    stage: Any, http: aiohttp.ClientSession
) -> None:
    """Handshakes of the same tab race: one stays, the others are told that they were replaced."""
    (token,) = stage.tokens("twin")
    tabs = await asyncio.gather(
        *(open_tab(http, stage.url, token, wait=False, client="the-tab") for _ in range(8))
    )

    async def fate(tab: Tab) -> int | None:
        """The close code; None for the one that stays and gets its answer."""
        try:
            await tab.until("ready", ANSWER_S)
            await tab.socket.send_json({"type": "ping", "t": 1})
            await tab.until("pong", ANSWER_S)
        except (TabClosed, ConnectionError) as closed:
            return closed.code if isinstance(closed, TabClosed) else tab.socket.close_code
        return None

    fates = await asyncio.gather(*map(fate, tabs))
    stayed = [tab for tab, code in zip(tabs, fates, strict=True) if code is None]
    codes = {code for code in fates if code is not None}
    # A late replacement may hit one that had its answer already.
    closing = [asyncio.create_task(tab.until_closed(1.0)) for tab in stayed]
    ends = await asyncio.gather(*closing, return_exceptions=True)
    assert [type(end) for end in ends].count(TimeoutError) == 1
    assert codes | {end for end in ends if isinstance(end, int)} == {4504}
    await asyncio.gather(*(tab.close() for tab in tabs))


@pytest.mark.asyncio
async def test_staging_authentication_race_condition_handling(
    stage: Any, http: aiohttp.ClientSession, get_ticket: GetTicket
) -> None:
    """Parallel logins of one user by tickets: every ticket once, one manager for all of them."""
    (token,) = stage.tokens("eager")
    tickets = await asyncio.gather(*(get_ticket(stage.url, token) for _ in range(20)))
    assert len(set(tickets)) == 20

    async def redeem(ticket: str) -> Tab | None:
        try:
            return await open_tab(http, stage.url, ticket=ticket)
        except aiohttp.WSServerHandshakeError as refused:
            assert refused.status == 401
            return None

    tabs = await asyncio.gather(*(redeem(ticket) for ticket in tickets * 3))
    opened = [tab for tab in tabs if tab is not None]
    assert len(opened) == 20
    assert all(sum(tab is not None for tab in tabs[i::20]) == 1 for i in range(20))
    assert len({tab.ready["manager"]["epoch"] for tab in opened}) == 1
    assert len({tab.ready["connection_id"] for tab in opened}) == 20

    # All of them renew their token at once; a message meanwhile is seen by all.
    for tab in opened:
        await tab.socket.send_json({"type": "auth", "token": token})
    id = new_id()
    await opened[0].send(id, QUESTION)
    for tab in opened:
        await tab.until("authenticated", ANSWER_S)
        while not any(event["type"] == "agent_completed" for event in tab.events):
            await tab.until("agent_completed", ANSWER_S)
    assert len({tuple(tab.texts) for tab in opened}) == 1
    await asyncio.gather(*(tab.close() for tab in opened))


@pytest.mark.asyncio
async def test_staging_authentication_race_condition_handling_of_login_codes(
    local_stage: Any, http: aiohttp.ClientSession, log_in: LogIn
) -> None:
    """A login code is good once, also for twenty at once; twenty codes are twenty logins."""
    codes = await local_stage.codes("popular", 20)
    race = await asyncio.gather(*(log_in(local_stage.urls[n % 2], codes[0]) for n in range(20)))
    assert sorted(status for status, _ in race) == [200] + [401] * 19
    assert {body["reason"] for status, body in race if status == 401} == {"TOKEN_INVALID"}

    logins = await asyncio.gather(
        *(log_in(local_stage.urls[n % 2], code) for n, code in enumerate(codes[1:]))
    )
    assert {status for status, _ in logins} == {200}
    tokens = {body["token"] for _, body in logins}
    assert len(tokens) == 19
    tabs = await asyncio.gather(*(open_tab(http, local_stage.url, token) for token in tokens))
    assert {tab.ready["user_id"] for tab in tabs} == {"popular"}
    assert len({tuple(tab.ready["manager"].values()) for tab in tabs}) == 1
    await asyncio.gather(*(tab.close() for tab in tabs))
