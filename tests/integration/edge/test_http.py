"""The handshake's refusals and the plain HTTP part, with a real auth service."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDict

from steward.model.keys import UserKey

pytestmark = pytest.mark.asyncio
ALICE = UserKey("default", "alice")
RESUME = json.loads(
    (Path(__file__).parents[3] / "protos" / "testdata" / "resume.json").read_text()
)["cases"]
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


async def refusal(edge: Any, headers: dict[str, str], path: str = "/v1/connect") -> tuple[int, str]:
    """Status and reason of a handshake that must not succeed."""
    async with edge.http.get(edge.url + path, headers={**UPGRADE, **headers}) as answer:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        body = await answer.json()
        assert body["message"]
        return answer.status, body["reason"]


async def test_a_handshake_without_a_good_credential_is_401(edge: Any) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": "Basic YTpi"},
        {**edge.bearer(), "Sec-WebSocket-Protocol": "steward.v1, steward.bearer.x"},
    ):
        assert await refusal(edge, headers) == (401, "TOKEN_INVALID")
    assert await refusal(edge, edge.bearer(), "/v1/connect?ticket=x") == (401, "TOKEN_INVALID")
    assert await refusal(edge, {}, f"/v1/connect?token={edge.auth.token()}") == (
        401,
        "TOKEN_INVALID",
    )


async def test_a_request_that_cannot_be_read_is_400_in_json_and_not_quoted(
    edge: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    head = f"GET /v1/threads HTTP/1.1\r\nHost: {edge.host}\r\n"
    secret = "topsecret" * 2000
    for broken in (f"{head}Authorization: Bearer {secret}\r\n\r\n", f"NO{secret}\r\n\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.service.port)
        writer.write(broken.encode())
        answer = (await asyncio.wait_for(reader.read(), 5)).decode()
        writer.close()
        fields, _, body = answer.partition("\r\n\r\n")
        assert fields.split()[1] == "400"
        assert json.loads(body)["reason"] == "PROTOCOL_VIOLATION"
        assert "topsecret" not in answer + caplog.text


async def test_a_handshake_that_is_none_is_400(edge: Any) -> None:
    good = edge.bearer()
    for broken in (
        {"Upgrade": "h2c"},
        {"Connection": "close"},
        {"Sec-WebSocket-Version": "8"},
        {"Sec-WebSocket-Key": "short"},
        {"Sec-WebSocket-Key": "not base64 at all!!!!!=="},
    ):
        assert await refusal(edge, {**good, **broken}) == (400, "PROTOCOL_VIOLATION")
    alone = {"Sec-WebSocket-Protocol": f"steward.bearer.{edge.auth.token()}"}
    assert await refusal(edge, alone) == (400, "PROTOCOL_VIOLATION")


async def test_a_handshake_is_a_get_without_a_body(edge: Any) -> None:
    for path in ("/v1/connect", "/v1/events"):
        headers = {**UPGRADE, **edge.bearer()}
        async with edge.http.head(edge.url + path, headers=headers) as answer:
            assert answer.status == 405
        async with edge.http.get(edge.url + path, headers=headers, data=b"body") as answer:
            assert answer.status == 400
            assert (await answer.json())["reason"] == "PROTOCOL_VIOLATION"


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("Content-Encoding: gzip\r\nContent-Length: 2", b"{}"),
        ("Transfer-Encoding: chunked", b"not a chunk\r\n"),
    ],
)
async def test_a_body_that_cannot_be_read_is_400_and_not_an_error_of_the_edge(
    edge: Any, caplog: pytest.LogCaptureFixture, header: str, body: bytes
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.service.port)
    bearer = edge.bearer()["Authorization"]
    head = f"POST /v1/messages HTTP/1.1\r\nHost: {edge.host}\r\nAuthorization: {bearer}\r\n{header}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    answer = await asyncio.wait_for(reader.readuntil(b"}"), 5)
    writer.close()
    assert answer.split()[1] == b"400"
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["reason"] == "PROTOCOL_VIOLATION"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_malformed_queries_of_the_vectors_are_400(edge: Any) -> None:
    for case in RESUME:
        path = f"/v1/connect?{case['query']}"
        if "http" in case["expect"]:
            status, reason = await refusal(edge, edge.bearer(), path)
            assert (status, reason) == (case["expect"]["http"], "PROTOCOL_VIOLATION"), case["name"]


async def test_foreign_origins_and_names_are_403(edge: Any) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        assert await refusal(edge, {**edge.bearer(), **headers}) == (403, "PERMISSION_DENIED")
        async with edge.http.get(f"{edge.url}/v1/threads", headers=headers) as answer:
            assert answer.status == 403
    both = CIMultiDict([*edge.bearer().items(), ("Origin", edge.url), ("Origin", "http://evil")])
    async with edge.http.get(f"{edge.url}/v1/threads", headers=both) as answer:
        assert answer.status == 403
    for origin in (edge.url, f"http://localhost:{edge.service.port}"):
        async with edge.socket(origin=origin) as client:
            assert client.ready["resume"] == "new"


async def test_the_bearer_subprotocol_is_answered_with_steward_v1_alone(edge: Any) -> None:
    protocols = ("steward.v1", f"steward.bearer.{edge.auth.token()}")
    async with edge.http.ws_connect(f"{edge.url}/v1/connect", protocols=protocols) as ws:
        assert ws.protocol == "steward.v1"
        assert json.loads((await ws.receive(10)).data)["type"] == "ready"


async def test_a_ticket_opens_one_connection_once(edge: Any) -> None:
    async with edge.http.post(f"{edge.url}/v1/tickets", headers=edge.bearer()) as answer:
        body = await answer.json()
        assert answer.status == 200 and body["expires_in"] == 30
    url = f"{edge.url}/v1/connect?ticket={body['ticket']}"
    async with edge.http.ws_connect(url) as ws:
        assert json.loads((await ws.receive(10)).data)["user_id"] == "alice"
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await edge.http.ws_connect(url)
    assert refused.value.status == 401


async def test_too_many_connections_of_a_user_are_429_and_none_is_evicted(make_edge: Any) -> None:
    edge = await make_edge(max_connections_per_user=2)
    async with edge.socket(query="?client=a") as first, edge.socket() as _:
        assert await refusal(edge, edge.bearer()) == (429, "RATE_LIMITED")
        async with edge.socket("bob"), edge.socket(query="?client=a") as again:
            assert await first.close_code() == 4504
            assert again.ready["limits"]["max_connections"] == 2
        async with edge.socket() as freed:
            assert freed.ready["resume"] == "new"


async def test_a_full_edge_is_503_with_retry_after(make_edge: Any) -> None:
    edge = await make_edge(max_connections=1)
    async with edge.socket():
        headers = {**UPGRADE, **edge.bearer("bob")}
        async with edge.http.get(f"{edge.url}/v1/connect", headers=headers) as answer:
            assert answer.status == 503 and answer.headers["Retry-After"] == "2"
            assert (await answer.json())["reason"] == "NO_CAPACITY"


async def test_without_auth_nobody_comes_in_and_readiness_says_why(make_edge: Any) -> None:
    edge = await make_edge(auth="127.0.0.1:1")
    headers = {**UPGRADE, **edge.bearer()}
    async with edge.http.get(f"{edge.url}/v1/connect", headers=headers) as answer:
        assert answer.status == 503 and answer.headers["Retry-After"] == "1"
    await edge.eventually(
        lambda: edge.service.unready() == "no connection to the auth service", "it says why"
    )
    async with edge.http.get(f"{edge.url}/readyz", headers={"Host": "10.0.0.1"}) as answer:
        assert answer.status == 503 and "auth" in (await answer.json())["why"]
    async with edge.http.get(f"{edge.url}/healthz") as answer:
        assert answer.status == 200


async def test_a_message_without_a_socket_is_accepted_and_repeatable(edge: Any) -> None:
    body = {"id": "m1", "content": "hello"}
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
    headers = {**edge.bearer(), "traceparent": trace}
    async with edge.socket() as client:
        for duplicate in (False, True):
            async with edge.http.post(
                f"{edge.url}/v1/messages", json=body, headers=headers
            ) as answer:
                assert answer.status == 202
                assert await answer.json() == {
                    "type": "accepted",
                    "id": "m1",
                    "run_id": "r-m1",
                    "sequence": 1,
                    "duplicate": duplicate,
                }
        assert (await client.until("user_message"))["trace"] == trace


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "PROTOCOL_VIOLATION"),
        (b'{"id":"m1"}', 400, "PROTOCOL_VIOLATION"),
        (b'{"id":"m1","content":"x","user_id":"bob"}', 400, "PROTOCOL_VIOLATION"),
        (b"[" * 5000, 400, "PROTOCOL_VIOLATION"),
        (b'{"id":"m1","content":"' + b"x" * 300_000 + b'"}', 413, "MESSAGE_TOO_LARGE"),
    ],
    ids=["not json", "no content", "identity", "bomb", "too large"],
)
async def test_bad_messages_are_refused(edge: Any, body: bytes, status: int, reason: str) -> None:
    url = f"{edge.url}/v1/messages"
    async with edge.http.post(url, data=body, headers=edge.bearer()) as answer:
        assert (answer.status, (await answer.json())["reason"]) == (status, reason)


async def test_the_rate_of_a_user_is_limited_with_retry_after(make_edge: Any) -> None:
    edge = await make_edge(messages_per_minute=2)
    statuses = []
    for n in range(3):
        body = {"id": f"m{n}", "content": "x"}
        async with edge.http.post(
            f"{edge.url}/v1/messages", json=body, headers=edge.bearer()
        ) as answer:
            statuses.append(answer.status)
            last = answer.headers.get("Retry-After")
    assert statuses == [202, 202, 429] and last == "30"


async def test_a_run_is_cancelled_from_any_edge(edge: Any) -> None:
    headers = edge.bearer()
    await (
        await edge.http.post(
            f"{edge.url}/v1/messages", json={"id": "m1", "content": "x"}, headers=headers
        )
    ).read()
    async with edge.http.post(f"{edge.url}/v1/runs/r-m1/cancel", headers=headers) as answer:
        assert answer.status == 202 and await answer.json() == {"run_id": "r-m1"}
    async with edge.http.post(f"{edge.url}/v1/runs/nope/cancel", headers=headers) as answer:
        assert answer.status == 404 and (await answer.json())["reason"] == "NOT_FOUND"


async def test_history_is_paged_forward_and_newest_first_without_after(edge: Any) -> None:
    edge.cluster.emit_numbered(ALICE, 25)
    url, headers = f"{edge.url}/v1/threads/main/events", edge.bearer()
    found: list[int] = []
    query: dict[str, str] = {"after": "0", "limit": "10"}
    while query:
        async with edge.http.get(url, params=query, headers=headers) as answer:
            page = await answer.json()
        assert page["stream_id"] == "s-alice"
        found += [event["sequence"] for event in page["events"]]
        query = {"after": str(page["next"]), "limit": "10"} if "next" in page else {}
    assert found == list(range(1, 26))
    async with edge.http.get(url, params={"limit": "3"}, headers=headers) as answer:
        page = await answer.json()
        assert [e["sequence"] for e in page["events"]] == [23, 24, 25] and "next" not in page
    for wrong in ("limit=0", "limit=1001", "limit=x", "after=x"):
        async with edge.http.get(f"{url}?{wrong}", headers=headers) as answer:
            assert answer.status == 400
    async with edge.http.get(f"{edge.url}/v1/threads", headers=headers) as answer:
        body = await answer.json()
        assert [thread["sequence"] for thread in body["threads"]] == [25] and "next" not in body
    # A placement that no manager comes to is never given back.
    assert edge.cluster.resolves == 0, "who only reads is placed nowhere"


async def read_events(answer: aiohttp.ClientResponse, count: int) -> list[dict[str, str]]:
    """The next `count` blocks of an event stream, as fields."""
    blocks: list[dict[str, str]] = []
    async with asyncio.timeout(10):
        while len(blocks) < count:
            block = {}
            while line := (await answer.content.readline()).decode().rstrip("\n"):
                name, _, value = line.partition(": ")
                block[name] = value
            blocks.append(block)
    return blocks


async def test_the_event_stream_begins_with_ready_and_resumes_by_last_event_id(edge: Any) -> None:
    edge.cluster.emit_numbered(ALICE, 3)
    url = f"{edge.url}/v1/events"
    async with edge.http.get(f"{url}?after=1", headers=edge.bearer()) as answer:
        assert answer.content_type == "text/event-stream"
        ready, two, three = await read_events(answer, 3)
        assert ready["event"] == "ready" and json.loads(ready["data"])["resume"] == "resumed"
        assert two["id"] == "s-alice:2" and "event" not in two
        assert json.loads(three["data"])["sequence"] == 3
        edge.cluster.emit_numbered(ALICE, 1)
        assert (await read_events(answer, 1))[0]["id"] == "s-alice:4"
    headers = {**edge.bearer(), "Last-Event-ID": "s-alice:3"}
    async with edge.http.get(f"{url}?after=0", headers=headers) as answer:
        blocks = await read_events(answer, 2)
        assert blocks[1]["id"] == "s-alice:4"
    async with edge.http.get(url, headers={**edge.bearer(), "Last-Event-ID": "x"}) as answer:
        assert answer.status == 400


async def test_the_event_stream_breaks_silence_with_comments_and_ends_with_the_edge(
    make_edge: Any,
) -> None:
    edge = await make_edge(heartbeat_seconds=0.2)
    async with edge.http.get(f"{edge.url}/v1/events", headers=edge.bearer()) as answer:
        await read_events(answer, 1)
        assert await answer.content.readline() == b": heartbeat\n"
        stopping = asyncio.ensure_future(edge.service.stop())
        async with asyncio.timeout(10):
            rest = await answer.content.read()
        assert b"event: going_away" in rest and rest.endswith(b'{"code":4002}\n\n')
        await stopping


async def test_pages_are_served_with_a_strict_policy(edge: Any) -> None:
    async with edge.http.get(f"{edge.url}/") as answer:
        assert answer.status == 200 and answer.content_type == "text/html"
        policy = answer.headers["Content-Security-Policy"]
        assert "script-src 'self'" in policy and "unsafe" not in policy
    for path in ("/static/../settings.py", "/static/%2e%2e/settings.py", "/nothing"):
        async with edge.http.get(edge.url + path) as answer:
            assert answer.status == 404 and (await answer.json())["reason"] == "NOT_FOUND"
    async with edge.http.get(f"{edge.url}/v1/messages") as answer:
        assert answer.status == 405
