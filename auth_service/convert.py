"""Between the wire (`steward.v1`) and the values of the core. Nothing else here knows both."""

from auth_service.core.grants import TicketReplayed
from auth_service.core.questions import (
    Answer,
    CheckToken,
    IssueTicket,
    LoggedIn,
    Question,
    RedeemLogin,
    RedeemTicket,
    TicketIssued,
)
from steward.errors import Reason, StewardError
from steward.model.identity import Identity
from steward.model.keys import UserKey
from steward.tokens import check_subject
from steward.v1 import auth_service_pb2 as pb
from steward.v1 import placement_pb2, registry_service_pb2


def question_of(message: pb.AuthQuestion) -> Question:
    """Raises StewardError(PROTOCOL_VIOLATION) for a question of a kind that is not known."""
    kind = message.WhichOneof("body")
    if kind == "check_token":
        return CheckToken(message.check_token.token)
    if kind == "issue_ticket":
        return IssueTicket(message.issue_ticket.token, message.issue_ticket.origin)
    if kind == "redeem_ticket":
        return RedeemTicket(message.redeem_ticket.ticket, message.redeem_ticket.origin)
    if kind == "redeem_login":
        return RedeemLogin(message.redeem_login.code)
    raise StewardError(Reason.PROTOCOL_VIOLATION, "a question without a known body")


def answer_message(request_id: int, answer: Answer) -> pb.AuthAnswer:
    if isinstance(answer, Identity):
        return pb.AuthAnswer(
            request_id=request_id,
            identity=pb.Identity(
                user=user_message(answer.user),
                scopes=answer.scopes,
                expires_at_ms=answer.expires_at_ms,
                issued_at_ms=answer.issued_at_ms,
                token_id=answer.token_id,
            ),
        )
    if isinstance(answer, TicketIssued):
        issued = pb.TicketIssued(ticket=answer.ticket, expires_in_seconds=answer.expires_in_s)
        return pb.AuthAnswer(request_id=request_id, ticket_issued=issued)
    if isinstance(answer, LoggedIn):
        logged_in = pb.LoggedIn(token=answer.token, expires_at_ms=answer.expires_at_ms)
        return pb.AuthAnswer(request_id=request_id, logged_in=logged_in)
    refusal = registry_service_pb2.Refusal(reason=answer.reason.value, message=answer.message)
    replayed = user_message(answer.user) if isinstance(answer, TicketReplayed) else None
    return pb.AuthAnswer(request_id=request_id, refusal=refusal, replayed=replayed)


def subject_of(message: placement_pb2.UserKey, scopes: list[str]) -> UserKey:
    """The user of an operator's request. Raises StewardError(PROTOCOL_VIOLATION)."""
    user = UserKey(message.tenant_id, message.user_id)
    try:
        check_subject(user, scopes)
    except ValueError as error:
        raise StewardError(Reason.PROTOCOL_VIOLATION, str(error)) from None
    return user


def user_message(user: UserKey) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id=user.tenant, user_id=user.user)
