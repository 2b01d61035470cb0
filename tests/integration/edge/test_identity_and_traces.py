"""Login, revocation and traces, with a real auth service behind a real edge."""

import json
from typing import Any

import pytest

from edge.host.spans import EdgeSpans
from steward.model.keys import UserKey
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.telemetry.tracing import FinishedSpan, Tracing
from steward.v1 import auth_service_pb2 as pb
from steward.v1.auth_service_pb2_grpc import AuthServiceStub
from steward.v1.placement_pb2 import UserKey as UserMessage

pytestmark = pytest.mark.asyncio


async def operator(edge: Any, method: str, request: Any) -> Any:
    """One operator's call to auth."""
    key = load_or_create_key(edge.auth.data, CONTROL_KEY)
    credentials = RoleCredentials(key, Role.OPERATOR, "edge-test", "test")
    channel = make_channel(edge.auth.address)
    try:
        call = getattr(AuthServiceStub(channel), method)
        return await call(request, timeout=5, metadata=call_metadata(credentials))
    finally:
        await channel.close()


async def test_a_login_code_gives_a_token_once(edge: Any) -> None:
    user = UserMessage(tenant_id="default", user_id="carol")
    made = await operator(edge, "CreateLogin", pb.CreateLoginRequest(user=user))
    url = f"{edge.url}/v1/login"
    async with edge.http.post(url, json={"code": made.code}) as answer:
        assert answer.status == 200 and answer.headers["Cache-Control"] == "no-store"
        body = await answer.json()
    assert body["token_expires_at"].endswith("Z")
    headers = {"Authorization": f"Bearer {body['token']}"}
    async with edge.http.ws_connect(f"{edge.url}/v1/connect", headers=headers) as ws:
        assert json.loads((await ws.receive(10)).data)["user_id"] == "carol"
    async with edge.http.post(url, json={"code": made.code}) as answer:
        assert answer.status == 401
    for wrong in (b"{}", b'{"code":5}', b"["):
        async with edge.http.post(url, data=wrong) as answer:
            assert answer.status == 400


async def test_a_revocation_closes_the_user_s_sockets_and_nobody_else_s(edge: Any) -> None:
    async with edge.socket("dave") as dave, edge.socket("erin") as erin:
        user = UserMessage(tenant_id="default", user_id="dave")
        await operator(edge, "RevokeUser", pb.RevokeUserRequest(user=user))
        assert await dave.close_code() == 4503
        await erin.send(type="ping", t=1)
        assert (await erin.frame())["type"] == "pong"


async def test_plain_calls_take_bearer_tokens_and_no_tickets(edge: Any) -> None:
    async with edge.http.post(f"{edge.url}/v1/tickets", headers=edge.bearer()) as answer:
        ticket = (await answer.json())["ticket"]
    async with edge.http.get(f"{edge.url}/v1/threads?ticket={ticket}") as answer:
        assert answer.status == 401
    async with edge.http.get(f"{edge.url}/v1/events?ticket={ticket}") as answer:
        assert answer.status == 200


class Recorder:
    """A span exporter that remembers."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str]] = []

    def export(self, span: FinishedSpan) -> None:
        assert span.start_ns <= span.end_ns
        self.spans.append((span.name, span.context[3:35]))

    def of(self, trace: str) -> list[str]:
        """Names of the spans of one trace."""
        return [name for name, of in self.spans if of == trace[3:35]]

    def close(self) -> None:
        """Nothing waits."""


@pytest.mark.parametrize("ratio", [1.0, 0.0])
async def test_a_message_begins_a_trace_with_the_given_ratio(edge: Any, ratio: float) -> None:
    recorder = Recorder()
    edge.service._hub.spans = EdgeSpans(Tracing(recorder, ratio))
    async with edge.socket() as client:
        await client.send(type="user_message", id="m1", content="x")
        trace = (await client.until("user_message"))["trace"]
    assert recorder.of(trace) == (["edge.receive"] if ratio else [])
    assert bool(recorder.spans) is bool(ratio)
    assert edge.cluster.commands[-1].user == UserKey("default", "alice")
