"""Auth on gRPC: one long stream per edge, and two calls for operators.

A stream is read by one task, which answers each batch before it reads the next, so a
greedy edge is slowed by flow control; it is written by the call itself, from a bounded
outbox. An edge whose outbox is full does not read, and its stream is ended: it comes
back, and gets every relevant revocation again.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

import grpc

from auth_service.convert import answer_message, question_of, subject_of, user_message
from auth_service.host import Authority
from steward.errors import Reason, StewardError
from steward.model.keys import UserKey
from steward.rpc.outbox import Outbox, OutboxClosed, OutboxFull
from steward.rpc.roles import Role
from steward.rpc.status import abort
from steward.telemetry.conventions import AUTH_VALIDATE
from steward.telemetry.logs import fields
from steward.telemetry.tracing import Kind, Tracing
from steward.v1 import auth_service_pb2 as pb
from steward.v1.auth_service_pb2_grpc import AuthServiceServicer as AuthServiceBase

HELLO_DEADLINE_S = 5.0
MAX_QUESTIONS = 1024
"""Questions in one message; more are a protocol violation."""

MOST_PER_MESSAGE = 512
OUTBOX_LIMIT = 65_536

ALLOWED: Mapping[str, frozenset[Role]] = {
    "/steward.v1.AuthService/HoldAuthStream": frozenset({Role.EDGE}),
    "/steward.v1.AuthService/CreateLogin": frozenset({Role.OPERATOR}),
    "/steward.v1.AuthService/RevokeUser": frozenset({Role.OPERATOR}),
}

Context = grpc.aio.ServicerContext[Any, Any]
_log = logging.getLogger(__name__)


class AuthServicer(AuthServiceBase):
    """`steward.v1.AuthService` over an `Authority`."""

    def __init__(
        self, authority: Authority, cluster: str, auth_id: str, tracing: Tracing | None = None
    ) -> None:
        self._authority = authority
        self._tracing = tracing or Tracing()
        self._cluster = cluster
        self._auth_id = auth_id
        self._streams: set[_EdgeStream] = set()

    async def HoldAuthStream(
        self, request_iterator: AsyncIterator[pb.HoldAuthStreamRequest], context: Context
    ) -> AsyncIterator[pb.HoldAuthStreamResponse]:
        try:
            edge_id = await self._greet(request_iterator)
        except StewardError as error:
            await abort(context, error)
        stream = _EdgeStream(self._authority, request_iterator, self._tracing)
        self._streams.add(stream)
        # Also when the call is cancelled while this generator is suspended at a yield.
        context.add_done_callback(partial(self._over, stream))  # type: ignore[arg-type]
        _log.info("edge stream opened", extra=fields(edge=edge_id))
        try:
            yield pb.HoldAuthStreamResponse(welcome=pb.AuthWelcome(auth_id=self._auth_id))
            stream.start()
            while items := await stream.outbox.take(MOST_PER_MESSAGE):
                for message in _messages(items):
                    yield message
        finally:
            self._over(stream)
        if stream.refusal is not None:
            await abort(context, stream.refusal)

    async def CreateLogin(
        self, request: pb.CreateLoginRequest, context: Context
    ) -> pb.CreateLoginResponse:
        try:
            user = subject_of(request.user, list(request.scopes))
            code, ttl_s = await self._authority.create_login(user, tuple(request.scopes))
        except StewardError as error:
            await abort(context, error)
        return pb.CreateLoginResponse(code=code, expires_in_seconds=ttl_s)

    async def RevokeUser(
        self, request: pb.RevokeUserRequest, context: Context
    ) -> pb.RevokeUserResponse:
        try:
            mark = await self._authority.revoke(subject_of(request.user, []))
        except StewardError as error:
            await abort(context, error)
        return pb.RevokeUserResponse(issued_before_ms=mark)

    def close(self) -> None:
        """End all edge streams after what they still have to say. Safe to call twice."""
        for stream in self._streams:
            stream.outbox.close()

    async def _greet(self, requests: AsyncIterator[pb.HoldAuthStreamRequest]) -> str:
        try:
            async with asyncio.timeout(HELLO_DEADLINE_S):
                first = await anext(requests, None)
        except TimeoutError:
            first = None
        if first is None or first.WhichOneof("body") != "hello" or not first.hello.edge_id:
            raise StewardError(Reason.PROTOCOL_VIOLATION, "the first message is AuthHello")
        if first.hello.cluster != self._cluster:
            raise StewardError(Reason.PERMISSION_DENIED, f"this is cluster {self._cluster!r}")
        return first.hello.edge_id

    def _over(self, stream: "_EdgeStream", _: object = None) -> None:
        stream.close()
        self._streams.discard(stream)


class _EdgeStream:
    """One edge: its reader, and what waits to be sent to it, in order."""

    def __init__(
        self,
        authority: Authority,
        requests: AsyncIterator[pb.HoldAuthStreamRequest],
        tracing: Tracing,
    ) -> None:
        self._tracing = tracing
        self.outbox: Outbox[pb.AuthAnswer | pb.UserRevoked] = Outbox(OUTBOX_LIMIT)
        self.refusal: StewardError | None = None
        self._authority = authority
        self._requests = requests
        self._reader: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._authority.subscribe(self._push)
        self._reader = asyncio.create_task(self._read(), name="auth-stream-reader")

    def close(self) -> None:
        """Safe to call twice."""
        self._authority.unsubscribe(self._push)
        self.outbox.close()
        if self._reader is not None:
            self._reader.cancel()

    async def _read(self) -> None:
        try:
            async for request in self._requests:
                if request.WhichOneof("body") != "batch":
                    raise StewardError(Reason.PROTOCOL_VIOLATION, "only batches follow the hello")
                await self._answer(request.batch)
        except StewardError as error:
            self.refusal = error
        except (OutboxFull, OutboxClosed):
            self.refusal = StewardError(Reason.SLOW_CONSUMER, "the edge does not read its answers")
        finally:
            self.outbox.close()

    async def _answer(self, batch: pb.AuthBatch) -> None:
        if len(batch.questions) > MAX_QUESTIONS:
            raise StewardError(
                Reason.PROTOCOL_VIOLATION, f"at most {MAX_QUESTIONS} questions in a batch"
            )
        questions = [question_of(message) for message in batch.questions]
        began_ns = time.time_ns()
        answers = await self._authority.answer(questions)
        # No await between the answers and the outbox: see `auth_service.host`.
        for message, answer in zip(batch.questions, answers, strict=True):
            self.outbox.put(answer_message(message.request_id, answer))
            if trace := message.traceparent:
                failed = isinstance(answer, StewardError) and answer.row.is_fault
                record = self._tracing.record
                record(AUTH_VALIDATE, trace, began_ns, {}, failed=failed, kind=Kind.SERVER)

    def _push(self, user: UserKey, issued_before_ms: int) -> None:
        try:
            self.outbox.put(
                pb.UserRevoked(user=user_message(user), issued_before_ms=issued_before_ms)
            )
        except OutboxFull:
            # An edge that missed a revocation must not go on: it gets all of them anew.
            self.refusal = StewardError(Reason.SLOW_CONSUMER, "the edge does not read")
            self.close()
        except OutboxClosed:
            pass  # The stream ends; the edge gets all relevant marks on the next one.


def _messages(
    items: list[pb.AuthAnswer | pb.UserRevoked],
) -> list[pb.HoldAuthStreamResponse]:
    """The items in the same order, neighbouring answers in one message."""
    messages: list[pb.HoldAuthStreamResponse] = []
    for item in items:
        if isinstance(item, pb.UserRevoked):
            messages.append(pb.HoldAuthStreamResponse(revoked=item))
        elif messages and messages[-1].WhichOneof("body") == "answers":
            messages[-1].answers.answers.append(item)
        else:
            messages.append(pb.HoldAuthStreamResponse(answers=pb.AuthAnswers(answers=[item])))
    return messages
