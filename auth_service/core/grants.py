"""One-use secrets: tickets for a handshake, codes for a login.

The store keeps a digest of the secret and what it stands for, and hands that out once,
however many ask. The functions here decide whether what was handed out is still good:
its time, its origin, and whether the user was revoked since. All times are Unix
milliseconds. Every refusal of an unknown, used or expired secret is the same sentence,
so that nobody learns which it was; inside, a ticket that comes again is told from others.
"""

import hashlib
from dataclasses import dataclass

from auth_service.core.revocations import Revocations
from steward.errors import Reason, StewardError
from steward.model.identity import Identity
from steward.model.keys import UserKey

MOST_USED = 10_000
TICKET_TTL_MS = 30_000
LOGIN_TTL_MS = 600_000
MAX_ORIGIN_CHARS = 512
_BAD_TICKET = "the ticket is unknown, used or expired"


@dataclass(frozen=True, slots=True)
class Ticket:
    """Stands for a token that was checked. `origin` is empty when the asker sent none."""

    identity: Identity
    origin: str
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class Login:
    """Stands for an operator's wish to let a user in."""

    user: UserKey
    scopes: tuple[str, ...]
    created_at_ms: int
    expires_at_ms: int


Grant = Ticket | Login


class TicketReplayed(StewardError):
    """A ticket of this user, which was used, came again."""

    def __init__(self, user: UserKey) -> None:
        super().__init__(Reason.TOKEN_INVALID, _BAD_TICKET)
        self.user = user


class UsedTickets:
    """Whose the last tickets were that were used here; only to tell a replay from a guess.

    Bounded, and empty after a restart: a replay is refused all the same, as any unknown ticket.
    """

    __slots__ = ("_users",)

    def __init__(self) -> None:
        self._users: dict[bytes, UserKey] = {}

    def add(self, digest: bytes, user: UserKey) -> None:
        self._users[digest] = user
        if len(self._users) > MOST_USED:
            del self._users[next(iter(self._users))]

    def check(self, digest: bytes) -> None:
        """Raises TicketReplayed for one that was used."""
        user = self._users.get(digest)
        if user is not None:
            raise TicketReplayed(user)


def digest_of(secret: str) -> bytes:
    """What the store knows of a secret. Secrets have 192 random bits, so a plain hash will do."""
    return hashlib.sha256(secret.encode()).digest()


def new_ticket(identity: Identity, origin: str, now_ms: int) -> Ticket:
    """A ticket for the holder of a good token. Raises StewardError(PROTOCOL_VIOLATION)."""
    if len(origin) > MAX_ORIGIN_CHARS:
        raise StewardError(Reason.PROTOCOL_VIOLATION, "the Origin is too long")
    return Ticket(identity, origin, now_ms + TICKET_TTL_MS)


def new_login(user: UserKey, scopes: tuple[str, ...], now_ms: int) -> Login:
    return Login(user, scopes, now_ms, now_ms + LOGIN_TTL_MS)


def redeem_ticket(
    ticket: Grant | None, origin: str, revocations: Revocations, now_ms: int
) -> Identity:
    """Who a ticket that was taken from the store stands for.

    Raises StewardError: TOKEN_INVALID for an unknown, used or expired ticket or another
    origin, TOKEN_EXPIRED or TOKEN_REVOKED when the token behind it ended meanwhile.
    """
    if not isinstance(ticket, Ticket) or ticket.expires_at_ms <= now_ms:
        raise StewardError(Reason.TOKEN_INVALID, _BAD_TICKET)
    if ticket.origin and ticket.origin != origin:
        raise StewardError(Reason.TOKEN_INVALID, "the ticket was issued to another origin")
    identity = ticket.identity
    if identity.expires_at_ms <= now_ms:
        raise StewardError(Reason.TOKEN_EXPIRED, "the token has expired; get a new one")
    revocations.check(identity.user, identity.issued_at_ms)
    return identity


def redeem_login(login: Grant | None, revocations: Revocations, now_ms: int) -> Login:
    """The login that a code stood for. Raises StewardError: TOKEN_INVALID, TOKEN_REVOKED."""
    if not isinstance(login, Login) or login.expires_at_ms <= now_ms:
        raise StewardError(Reason.TOKEN_INVALID, "the login code is unknown, used or expired")
    revocations.check(login.user, login.created_at_ms)
    return login
