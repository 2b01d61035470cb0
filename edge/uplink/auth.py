"""The edge's stream to auth over gRPC (`HoldAuthStream`): credentials go, identities come.

The edge holds no key and decides nothing. A question ends with an answer within
`ANSWER_S`, or with MANAGER_UNAVAILABLE: never with a yes. Nothing is asked twice: a ticket
that was sent may be used up. Revocations are pushed on the same stream.

One message of questions is under way at a time, since auth answers them one after the other
anyway: what is asked meanwhile waits for its answers and travels together. So a lone question
waits for nothing but the end of the loop's turn, and a crowd costs few messages.
"""

import asyncio
import logging
from collections import deque
from typing import Any

from edge.convert import error_of_refusal, identity_of, user_of
from edge.uplink.port import AuthListener, LoggedIn, TicketIssued, TicketReplayed
from edge.uplink.questions import Questions
from steward.errors import Reason, StewardError
from steward.model.identity import Identity
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.outbox import Outbox, OutboxClosed
from steward.rpc.roles import RoleCredentials
from steward.rpc.stream import PeerStream, keep
from steward.telemetry.logs import fields
from steward.v1 import auth_service_pb2 as pb
from steward.v1 import auth_service_pb2_grpc as rpc

ANSWER_S = 3.0
MOST_QUESTIONS = 256
MOST_WAITING = 65_536

_Batch = list[pb.AuthQuestion]
_log = logging.getLogger(__name__)


class GrpcAuth:
    """`edge.uplink.port.Auth` over one stream that is opened again when it breaks."""

    def __init__(
        self,
        address: str,
        credentials: RoleCredentials,
        cluster: str,
        edge_id: str,
        listener: AuthListener,
    ) -> None:
        self._channel = make_channel(address)
        self._stub = rpc.AuthServiceStub(self._channel)
        self._credentials = credentials
        self._listener = listener
        self._questions = Questions("the auth service", ANSWER_S)
        self._loop = asyncio.get_running_loop()
        self._outbox: Outbox[_Batch] = Outbox()
        self._waiting: deque[pb.AuthQuestion] = deque()
        # How many questions of the message under way have no answer yet.
        self._unanswered = 0
        self._sending = False
        self._connected = False
        self._was_connected = False
        self._stream: PeerStream[_Batch, pb.HoldAuthStreamRequest, pb.HoldAuthStreamResponse] = (
            PeerStream(
                open_call=lambda: self._stub.HoldAuthStream(
                    metadata=call_metadata(self._credentials)
                ),
                hello=pb.HoldAuthStreamRequest(
                    hello=pb.AuthHello(cluster=cluster, edge_id=edge_id)
                ),
                pack=lambda batches: pb.HoldAuthStreamRequest(
                    batch=pb.AuthBatch(questions=batches[0])
                ),
                most=1,
                on_welcome=self._on_welcome,
                on_message=self._on_message,
            )
        )
        self._task = asyncio.create_task(
            keep(self._attempt, lambda: self._was_connected, self._on_down)
        )

    @property
    def connected(self) -> bool:
        return self._connected

    def check_token(self, token: str, traceparent: str = "") -> "asyncio.Future[Identity]":
        return self._ask(
            pb.AuthQuestion(check_token=pb.CheckToken(token=token), traceparent=traceparent)
        )

    def redeem_ticket(
        self, ticket: str, origin: str, traceparent: str = ""
    ) -> "asyncio.Future[Identity]":
        redeem = pb.RedeemTicket(ticket=ticket, origin=origin)
        return self._ask(pb.AuthQuestion(redeem_ticket=redeem, traceparent=traceparent))

    def issue_ticket(self, token: str, origin: str) -> "asyncio.Future[TicketIssued]":
        return self._ask(pb.AuthQuestion(issue_ticket=pb.IssueTicket(token=token, origin=origin)))

    def redeem_login(self, code: str) -> "asyncio.Future[LoggedIn]":
        return self._ask(pb.AuthQuestion(redeem_login=pb.RedeemLogin(code=code)))

    async def close(self) -> None:
        """End the stream. Safe to call twice."""
        self._task.cancel()
        await asyncio.wait({self._task})
        self._questions.close()
        await self._channel.close()

    def _ask(self, question: pb.AuthQuestion) -> "asyncio.Future[Any]":
        number, future = self._questions.ask()
        question.request_id = number
        if not self._connected or len(self._waiting) >= MOST_WAITING:
            text = "identity can't be checked right now; come again"
            self._questions.answer(
                number, StewardError(Reason.MANAGER_UNAVAILABLE, text, retry_after_ms=1000)
            )
            return future
        self._waiting.append(question)
        if not self._unanswered and not self._sending:
            self._sending = True
            self._loop.call_soon(self._send)
        return future

    def _send(self) -> None:
        """One message of those that wait; the next one when it is answered."""
        self._sending = False
        waiting = self._waiting
        batch: _Batch = []
        while waiting and len(batch) < MOST_QUESTIONS:
            question = waiting.popleft()
            if self._questions.waits(question.request_id):
                batch.append(question)
        if batch:
            self._unanswered = len(batch)
            try:
                self._outbox.put(batch)
            except OutboxClosed:
                pass  # The stream is ending, and with it every question.

    async def _attempt(self) -> None:
        self._was_connected = False
        self._outbox = Outbox()
        try:
            await self._stream.hold(self._outbox)
        finally:
            self._connected = False
            self._waiting.clear()
            self._unanswered = 0
            self._questions.fail_all()

    def _on_down(self, error: StewardError) -> None:
        if self._was_connected or error.reason is Reason.PERMISSION_DENIED:
            _log.warning("auth stream over", extra=fields(why=str(error)))

    def _on_welcome(self, message: pb.HoldAuthStreamResponse) -> None:
        self._connected = self._was_connected = True

    def _on_message(self, message: pb.HoldAuthStreamResponse) -> None:
        match message.WhichOneof("body"):
            case "answers":
                for answer in message.answers.answers:
                    self._questions.answer(answer.request_id, _value_of(answer))
                self._unanswered -= len(message.answers.answers)
                if self._unanswered <= 0:
                    self._unanswered = 0
                    self._send()
            case "revoked":
                self._listener.user_revoked(
                    user_of(message.revoked.user), message.revoked.issued_before_ms
                )
            case _:
                pass


def _value_of(answer: pb.AuthAnswer) -> Identity | TicketIssued | LoggedIn | StewardError:
    match answer.WhichOneof("body"):
        case "identity":
            return identity_of(answer.identity)
        case "ticket_issued":
            return TicketIssued(
                answer.ticket_issued.ticket, answer.ticket_issued.expires_in_seconds
            )
        case "logged_in":
            return LoggedIn(answer.logged_in.token, answer.logged_in.expires_at_ms)
        case "refusal" if answer.HasField("replayed"):
            return TicketReplayed(answer.refusal.message, user_of(answer.replayed))
        case "refusal":
            return error_of_refusal(answer.refusal)
        case _:
            return StewardError(Reason.INTERNAL, "auth gave an answer of a later version")
