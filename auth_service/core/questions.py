"""What an edge asks about a credential, and what it is answered."""

from dataclasses import dataclass

from steward.errors import StewardError
from steward.model.identity import Identity


@dataclass(frozen=True, slots=True)
class CheckToken:
    """Who holds this token?"""

    token: str


@dataclass(frozen=True, slots=True)
class IssueTicket:
    """A one-use ticket for the holder of a token; `origin` is empty when none was sent."""

    token: str
    origin: str


@dataclass(frozen=True, slots=True)
class RedeemTicket:
    """Who holds this ticket? It is used up by the question."""

    ticket: str
    origin: str


@dataclass(frozen=True, slots=True)
class RedeemLogin:
    """A token for this login code, which is used up by the question."""

    code: str


Question = CheckToken | IssueTicket | RedeemTicket | RedeemLogin


@dataclass(frozen=True, slots=True)
class TicketIssued:
    """A ticket, in the only place where it is ever written in clear."""

    ticket: str
    expires_in_s: int


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """A fresh token. Unix milliseconds."""

    token: str
    expires_at_ms: int


Answer = Identity | TicketIssued | LoggedIn | StewardError
