"""Auth as edges and operators meet it: a real process, over real gRPC (see conftest.py)."""

import asyncio
import base64
import json
import signal
import time
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from steward.errors import Reason
from steward.model.keys import UserKey
from steward.rpc.keys import USER_KEY, load_or_create_key
from steward.rpc.roles import Role
from steward.rpc.status import error_of
from steward.tokens import mint, verify
from steward.v1 import auth_service_pb2 as pb
from steward.v1.placement_pb2 import UserKey as UserMessage

ALICE = UserKey("default", "alice")
BOB = UserKey("acme", "bob")
ORIGIN = "http://127.0.0.1:8080"


def user_key(auth: Any) -> Ed25519PrivateKey:
    return load_or_create_key(auth.data, USER_KEY)


def token_of(auth: Any, user: UserKey = ALICE, ttl_s: int = 60) -> str:
    return mint(user_key(auth), user, ttl_s, ["chat"])


def refused(answer: pb.AuthAnswer) -> str:
    assert answer.WhichOneof("body") == "refusal", answer
    return answer.refusal.reason


@pytest.mark.asyncio
async def test_a_valid_token_gives_the_identity_in_it(auth: Any) -> None:
    async with auth.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        answer = await edge.check(token_of(auth, BOB))
        assert answer.identity.user == UserMessage(tenant_id="acme", user_id="bob")
        assert list(answer.identity.scopes) == ["chat"]
        assert 0 < answer.identity.expires_at_ms - time.time() * 1000 <= 60_000


@pytest.mark.asyncio
async def test_tokens_that_are_not_genuine_and_current_are_refused(auth: Any) -> None:
    key = user_key(auth)
    now = int(time.time())
    good = {
        "iss": "steward",
        "aud": "steward",
        "sub": "alice",
        "iat": now,
        "exp": now + 60,
        "jti": "1",
    }

    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    public_pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    hs256_input = f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part(good)}"
    hs256 = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    mac = base64.urlsafe_b64encode(hs256.sign(hs256_input.encode(), public_pem)).rstrip(b"=")
    tokens = {
        "expired": jwt.encode({**good, "iat": now - 60, "exp": now - 1}, key, "EdDSA"),
        "wrong audience": jwt.encode({**good, "aud": "other"}, key, "EdDSA"),
        "other key": jwt.encode(good, Ed25519PrivateKey.generate(), "EdDSA"),
        "alg none": f"{part({'alg': 'none'})}.{part(good)}.",
        "HS256 with the public key": f"{hs256_input}.{mac.decode()}",
        "role token": auth.credentials(Role.OPERATOR).token(),
        "empty": "",
        "brackets": base64.urlsafe_b64encode(b"[" * 3000).decode() + ".e30.e30",
    }
    async with auth.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        questions = [
            pb.AuthQuestion(check_token=pb.CheckToken(token=token)) for token in tokens.values()
        ]
        answers = await edge.ask_all(*questions)
        # A ticket is not had for them either.
        tickets = [await edge.issue(token) for token in tokens.values()]
        assert (await edge.check(jwt.encode(good, key, "EdDSA"))).HasField("identity")
    expected = {name: "TOKEN_INVALID" for name in tokens} | {"expired": "TOKEN_EXPIRED"}
    assert dict(zip(tokens, map(refused, answers), strict=True)) == expected
    assert dict(zip(tokens, map(refused, tickets), strict=True)) == expected
    for token, answer in zip(tokens.values(), answers, strict=True):
        assert not token or token not in answer.refusal.message


@pytest.mark.asyncio
async def test_a_batch_is_answered_whole_and_each_question_for_itself(auth: Any) -> None:
    async with auth.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        users = [UserKey("default", f"user-{n}") for n in range(100)]
        answers = await edge.ask_all(
            *(
                pb.AuthQuestion(check_token=pb.CheckToken(token=token_of(auth, user)))
                for user in users
            ),
            pb.AuthQuestion(check_token=pb.CheckToken(token="rubbish")),
        )
        assert [a.identity.user.user_id for a in answers[:-1]] == [user.user for user in users]
        assert refused(answers[-1]) == "TOKEN_INVALID"


@pytest.mark.asyncio
async def test_a_ticket_opens_once(auth: Any) -> None:
    async with auth.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        token = token_of(auth)
        issued = (await edge.issue(token)).ticket_issued
        assert issued.expires_in_seconds == 30
        first = (await edge.redeem(issued.ticket)).identity
        assert first == (await edge.check(token)).identity
        again = await edge.redeem(issued.ticket)
        guessed = await edge.redeem("never-issued")
        assert refused(again) == refused(guessed) == "TOKEN_INVALID"
        assert again.refusal == guessed.refusal, "whoever asks learns nothing"
        assert again.replayed.user_id == "alice", "but the edge can put it on record"
        assert not guessed.HasField("replayed")


@pytest.mark.asyncio
async def test_a_ticket_with_another_origin_opens_nothing_and_is_used_up(auth: Any) -> None:
    async with auth.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        ticket = (await edge.issue(token_of(auth), ORIGIN)).ticket_issued.ticket
        assert refused(await edge.redeem(ticket, "http://evil.example")) == "TOKEN_INVALID"
        assert refused(await edge.redeem(ticket, ORIGIN)) == "TOKEN_INVALID"
        ticket = (await edge.issue(token_of(auth), ORIGIN)).ticket_issued.ticket
        assert (await edge.redeem(ticket, ORIGIN)).identity.user.user_id == "alice"


@pytest.mark.asyncio
async def test_of_two_concurrent_redeems_on_two_edges_exactly_one_wins(auth: Any) -> None:
    async with auth.caller(Role.EDGE) as one, auth.caller(Role.EDGE) as two:
        first, second = await one.edge("edge-1"), await two.edge("edge-2")
        for _ in range(20):
            ticket = (await first.issue(token_of(auth))).ticket_issued.ticket
            answers = await asyncio.gather(first.redeem(ticket), second.redeem(ticket))
            kinds = sorted(str(answer.WhichOneof("body")) for answer in answers)
            assert kinds == ["identity", "refusal"]


@pytest.mark.asyncio
async def test_a_login_code_gives_one_token_with_the_scopes_it_was_made_for(auth: Any) -> None:
    async with auth.caller(Role.OPERATOR) as operator, auth.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        code = await operator.create_login(BOB, ("chat", "admin"))
        logged_in = (await edge.log_in(code)).logged_in
        identity = verify(user_key(auth).public_key(), logged_in.token)
        assert (identity.user, identity.scopes) == (BOB, ("chat", "admin"))
        assert identity.expires_at_ms == logged_in.expires_at_ms
        assert (await edge.check(logged_in.token)).identity.user.user_id == "bob"
        assert refused(await edge.log_in(code)) == "TOKEN_INVALID"


@pytest.mark.asyncio
async def test_codes_and_tickets_do_not_open_each_others_doors(auth: Any) -> None:
    async with auth.caller(Role.OPERATOR) as operator, auth.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        ticket = (await edge.issue(token_of(auth))).ticket_issued.ticket
        assert refused(await edge.log_in(ticket)) == "TOKEN_INVALID"
        assert refused(await edge.redeem(await operator.create_login(BOB))) == "TOKEN_INVALID"


@pytest.mark.asyncio
async def test_a_revocation_ends_what_was_issued_and_nothing_later(auth: Any) -> None:
    async with auth.caller(Role.OPERATOR) as operator, auth.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        token = token_of(auth)
        ticket = (await edge.issue(token)).ticket_issued.ticket
        code = await operator.create_login(ALICE)
        await operator.revoke(ALICE)
        assert refused(await edge.check(token)) == "TOKEN_REVOKED"
        assert refused(await edge.issue(token)) == "TOKEN_REVOKED"
        assert refused(await edge.redeem(ticket)) == "TOKEN_REVOKED"
        assert refused(await edge.log_in(code)) == "TOKEN_REVOKED"
        # The same user of another tenant, and a token from after the mark, are untouched.
        assert (await edge.check(token_of(auth, UserKey("acme", "alice")))).HasField("identity")
        fresh = (await edge.log_in(await operator.create_login(ALICE))).logged_in.token
        assert (await edge.check(fresh)).HasField("identity")


@pytest.mark.asyncio
async def test_a_revocation_is_pushed_to_every_edge_and_to_those_that_come_later(
    auth: Any,
) -> None:
    async with auth.caller(Role.OPERATOR) as operator, auth.caller(Role.EDGE) as caller:
        edges = [await caller.edge("edge-1"), await caller.edge("edge-2")]
        mark = await operator.revoke(ALICE)
        edges.append(await caller.edge("edge-3"))
        for edge in edges:
            pushed = await edge.next_revocation()
            assert (pushed.user.user_id, pushed.issued_before_ms) == ("alice", mark)
        assert abs(mark - time.time() * 1000) < 10_000


@pytest.mark.asyncio
async def test_a_kill_forgets_no_revocation_no_used_ticket_and_no_unused_login(auth: Any) -> None:
    async with auth.caller(Role.OPERATOR) as operator, auth.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        token, bobs = token_of(auth), token_of(auth, BOB)
        unused, used = await operator.create_login(BOB), await operator.create_login(BOB)
        ticket = (await edge.issue(bobs)).ticket_issued.ticket
        await edge.redeem(ticket)
        await edge.log_in(used)
        mark = await operator.revoke(ALICE)
    await auth.kill()
    await auth.start()
    async with auth.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        assert (await edge.next_revocation()).issued_before_ms == mark
        assert refused(await edge.check(token)) == "TOKEN_REVOKED"
        assert refused(await edge.redeem(ticket)) == "TOKEN_INVALID"
        assert refused(await edge.log_in(used)) == "TOKEN_INVALID"
        assert (await edge.log_in(unused)).logged_in.token
        assert (await edge.check(bobs)).HasField("identity")


@pytest.mark.asyncio
async def test_only_edges_hold_streams_and_only_operators_make_logins_and_revoke(
    auth: Any,
) -> None:
    user = UserMessage(tenant_id="default", user_id="alice")
    for role in Role:
        async with auth.caller(role) as caller:
            if role is not Role.EDGE:
                call = caller.stub.HoldAuthStream(metadata=caller.metadata)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert error_of(caught.value).reason is Reason.PERMISSION_DENIED
            if role is not Role.OPERATOR:
                for method, request in (
                    (caller.stub.CreateLogin, pb.CreateLoginRequest(user=user)),
                    (caller.stub.RevokeUser, pb.RevokeUserRequest(user=user)),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await method(request, metadata=caller.metadata, timeout=5)
                    assert error_of(caught.value).reason is Reason.PERMISSION_DENIED


@pytest.mark.asyncio
async def test_no_role_token_and_that_of_another_cluster_open_nothing(auth: Any) -> None:
    request = pb.RevokeUserRequest(user=UserMessage(tenant_id="default", user_id="alice"))
    async with auth.caller(Role.OPERATOR, "other") as caller:
        for metadata in ((), (("authorization", "Bearer x"),), caller.metadata):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await caller.stub.RevokeUser(request, metadata=metadata, timeout=5)
            assert error_of(caught.value).reason is Reason.PERMISSION_DENIED


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (pb.HoldAuthStreamRequest(), None, Reason.PROTOCOL_VIOLATION),
        (pb.HoldAuthStreamRequest(batch=pb.AuthBatch()), None, Reason.PROTOCOL_VIOLATION),
        (pb.AuthHello(cluster="test"), None, Reason.PROTOCOL_VIOLATION),
        (pb.AuthHello(cluster="other", edge_id="e"), None, Reason.PERMISSION_DENIED),
        (
            pb.AuthHello(cluster="test", edge_id="e"),
            pb.HoldAuthStreamRequest(hello=pb.AuthHello(cluster="test", edge_id="e")),
            Reason.PROTOCOL_VIOLATION,
        ),
        (
            pb.AuthHello(cluster="test", edge_id="e"),
            pb.HoldAuthStreamRequest(batch=pb.AuthBatch(questions=[pb.AuthQuestion()])),
            Reason.PROTOCOL_VIOLATION,
        ),
        (
            pb.AuthHello(cluster="test", edge_id="e"),
            pb.HoldAuthStreamRequest(batch=pb.AuthBatch(questions=[pb.AuthQuestion()] * 1025)),
            Reason.PROTOCOL_VIOLATION,
        ),
    ],
)
async def test_a_stream_out_of_order_is_ended(
    auth: Any, first: Any, second: Any, reason: Reason
) -> None:
    async with auth.caller(Role.EDGE) as caller:
        call = caller.stub.HoldAuthStream(metadata=caller.metadata)
        if isinstance(first, pb.AuthHello):
            first = pb.HoldAuthStreamRequest(hello=first)
        await call.write(first)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(5):
                if second is not None:
                    assert (await call.read()).HasField("welcome")
                    await call.write(second)
                await call.read()
        assert error_of(caught.value).reason is reason


@pytest.mark.asyncio
@pytest.mark.parametrize("user", [UserKey("default", ""), UserKey("", "a"), UserKey("a", "b\n")])
async def test_an_operator_may_not_name_a_user_that_no_token_can_name(
    auth: Any, user: UserKey
) -> None:
    async with auth.caller(Role.OPERATOR) as operator:
        for attempt in (operator.create_login, operator.revoke):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await attempt(user)
            assert error_of(caught.value).reason is Reason.PROTOCOL_VIOLATION


@pytest.mark.asyncio
async def test_checks_are_counted_by_kind_and_result(auth: Any) -> None:
    async with auth.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        await edge.check(token_of(auth))
        await edge.check("rubbish")
        await edge.redeem("rubbish")
    text = await auth.metrics()
    assert 'steward_auth_checks_total{kind="token",result="ok"} 1.0' in text
    assert 'steward_auth_checks_total{kind="token",result="TOKEN_INVALID"} 1.0' in text
    assert 'steward_auth_checks_total{kind="ticket",result="TOKEN_INVALID"} 1.0' in text
    assert "steward_auth_check_seconds_count 3.0" in text


@pytest.mark.asyncio
async def test_a_second_auth_on_the_same_data_is_refused_with_exit_code_two(auth: Any) -> None:
    second = await auth.spawn(0, 0)
    async with asyncio.timeout(20):
        _, stderr = await second.communicate()
    assert second.returncode == 2
    assert b"in use by another auth process" in stderr
    async with auth.caller(Role.EDGE) as caller:
        edge = await caller.edge()
        assert (await edge.check(token_of(auth))).HasField("identity")


@pytest.mark.asyncio
async def test_sigterm_ends_open_streams_and_exits_cleanly_at_once(auth: Any) -> None:
    async with auth.caller(Role.EDGE) as caller:
        await caller.edge()
        began = time.monotonic()
        auth.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            _, stderr = await auth.process.communicate()
        assert auth.process.returncode == 0
        assert time.monotonic() - began < 5
        assert stderr == b""


@pytest.mark.asyncio
async def test_edges_that_come_and_go_leave_a_quiet_and_working_process(auth: Any) -> None:
    async with auth.caller(Role.EDGE) as caller:
        for _ in range(10):
            edge = await caller.edge()
            await edge.check("rubbish")
            await edge.close()
        edge = await caller.edge()
        assert (await edge.check(token_of(auth))).HasField("identity")
    auth.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(10):
        _, stderr = await auth.process.communicate()
    assert stderr == b""
