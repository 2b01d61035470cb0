"""The authority: decides who somebody is, over the keys and the store.

Every answer comes from three steps: check the signatures, let the store hand out or
keep one-use secrets in one atomic step, then look at the revocations. That last look
and the hand-over of the answers happen without giving way to another task, and a
revocation is noted and pushed likewise: so on one stream an identity that was given
before a revocation always arrives before it, and none that falls under it arrives after.

Fails closed: without the store no one-use secret is good for anything, a revocation counts
before it is stored, and nobody is let in while one that another process acknowledged may be
unknown here.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from auth_service.core.grants import (
    LOGIN_TTL_MS,
    TICKET_TTL_MS,
    Grant,
    Ticket,
    UsedTickets,
    digest_of,
    new_login,
    new_ticket,
    redeem_login,
    redeem_ticket,
)
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
from auth_service.core.revocations import Revocations
from auth_service.known import KnownTokens
from auth_service.store.port import AuthStore, Change, Keep, Mark, StoreFailed, Take
from steward.errors import Reason, StewardError
from steward.model.identity import Identity
from steward.model.keys import UserKey
from steward.runtime.clock import wall_ms
from steward.telemetry.catalog import AuthMetrics
from steward.tokens import MAX_LIFETIME_S, mint

STORE_DEADLINE_S = 5.0
TURN = 32
"""Signatures checked before other streams get their turn; about 5 ms."""

SECRET_BYTES = 24

Push = Callable[[UserKey, int], None]
Clock = Callable[[], int]
Finish = Callable[[Grant | None], Answer]

_KINDS: dict[type[Question], str] = {
    CheckToken: "token",
    IssueTicket: "ticket_issue",
    RedeemTicket: "ticket",
    RedeemLogin: "login",
}


class _Prepared(NamedTuple):
    change: Change | None
    finish: Finish


def _refuse(error: StewardError) -> Finish:
    def finish(_: Grant | None) -> Answer:
        raise error

    return finish


class Authority:
    """Answers questions and ends users' tokens. One event loop; no locks."""

    def __init__(
        self,
        key: Ed25519PrivateKey,
        store: AuthStore,
        revocations: Revocations,
        metrics: AuthMetrics,
        *,
        login_token_ttl_s: int,
        clock: Clock = wall_ms,
    ) -> None:
        """`clock` gives Unix milliseconds."""
        self._key = key
        self._tokens = KnownTokens(key.public_key())
        self._store = store
        self._revocations = revocations
        self._metrics = metrics
        self._login_token_ttl_s = login_token_ttl_s
        self._clock = clock
        self._listeners: set[Push] = set()
        self._used = UsedTickets()

    @classmethod
    async def open(
        cls,
        key: Ed25519PrivateKey,
        store: AuthStore,
        metrics: AuthMetrics,
        *,
        login_token_ttl_s: int,
        clock: Clock = wall_ms,
    ) -> "Authority":
        """An authority that knows all stored revocations, and learns those of other processes."""
        revocations = Revocations({}, MAX_LIFETIME_S * 1000)
        authority = cls(
            key, store, revocations, metrics, login_token_ttl_s=login_token_ttl_s, clock=clock
        )
        await store.follow(authority._note)
        return authority

    def subscribe(self, push: Push) -> None:
        """Call `push(user, issued_before_ms)` for each relevant revocation, now and from now on."""
        self._listeners.add(push)
        for user, mark in self._revocations.relevant(self._clock()):
            push(user, mark)

    def unsubscribe(self, push: Push) -> None:
        """Safe to call twice."""
        self._listeners.discard(push)

    async def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question, in the same order; refusals are answers too.

        The caller must hand the answers on before it awaits anything else.
        """
        began = time.perf_counter()
        prepared: list[_Prepared] = []
        for index, question in enumerate(questions):
            if index and index % TURN == 0:
                await asyncio.sleep(0)  # Gives way; nothing is waited for.
            prepared.append(self._prepare(question))
        changes = [p.change for p in prepared if p.change is not None]
        refusal: StewardError | None = None
        granted: list[Grant | None] = []
        if changes:
            try:
                granted = await self._apply(changes)
            except StewardError as error:
                refusal = error
        # From here to the caller's next await nothing else runs.
        grants = iter(granted)
        answers: list[Answer] = []
        for question, (change, finish) in zip(questions, prepared, strict=True):
            answer: Answer
            try:
                if change is None:
                    answer = finish(None)
                elif refusal is None:
                    answer = finish(next(grants))
                else:
                    answer = refusal
            except StewardError as error:
                answer = error
            answers.append(answer)
            result = answer.reason.value if isinstance(answer, StewardError) else "ok"
            self._metrics.checks.labels(_KINDS[type(question)], result).inc()
        self._metrics.check_seconds.observe(time.perf_counter() - began)
        return answers

    async def create_login(self, user: UserKey, scopes: tuple[str, ...]) -> tuple[str, int]:
        """A login code and its life in seconds. Raises StewardError(STORE_UNAVAILABLE)."""
        code = secrets.token_urlsafe(SECRET_BYTES)
        await self._apply([Keep(digest_of(code), new_login(user, scopes, self._clock()))])
        return code, LOGIN_TTL_MS // 1000

    async def revoke(self, user: UserKey) -> int:
        """End what was issued to `user` until now; the mark, Unix milliseconds.

        It counts and is pushed at once, and is durable when this returns. Safe to retry.
        Raises StewardError(STORE_UNAVAILABLE): then it may not survive a restart.
        """
        mark = self._revocations.next_mark(user, self._clock())
        self._note({user: mark})
        await self._apply([Mark(user, mark)])
        return mark

    def _note(self, marks: Mapping[UserKey, int]) -> None:
        """Let revocations count, and push those that are news."""
        for user, mark in marks.items():
            if self._revocations.note(user, mark):
                for push in list(self._listeners):
                    push(user, mark)

    def _prepare(self, question: Question) -> "_Prepared":
        """Check what needs no store; say what is wanted of it, and how to go on from there."""
        if isinstance(question, RedeemTicket):
            origin, digest = question.origin, digest_of(question.ticket)
            return _Prepared(Take(digest), lambda grant: self._let_in(digest, grant, origin))
        if isinstance(question, RedeemLogin):
            return _Prepared(Take(digest_of(question.code)), self._log_in)
        try:
            now = self._clock()
            identity = self._tokens.verify(question.token, now)
            if isinstance(question, CheckToken):
                return _Prepared(None, lambda _: self._surely_unrevoked(identity))
            # Checked before as well: a revoked user must not fill the store.
            self._unrevoked(identity)
            ticket = secrets.token_urlsafe(SECRET_BYTES)
            issued = TicketIssued(ticket, TICKET_TTL_MS // 1000)
            return _Prepared(
                Keep(digest_of(ticket), new_ticket(identity, question.origin, now)),
                lambda _: self._unrevoked(identity) and issued,
            )
        except StewardError as error:
            return _Prepared(None, _refuse(error))

    def _unrevoked(self, identity: Identity) -> Identity:
        self._revocations.check(identity.user, identity.issued_at_ms)
        return identity

    def _surely_unrevoked(self, identity: Identity) -> Identity:
        self._be_sure()
        return self._unrevoked(identity)

    def _let_in(self, digest: bytes, grant: Grant | None, origin: str) -> Identity:
        if grant is None:
            self._used.check(digest)
        elif isinstance(grant, Ticket):
            self._used.add(digest, grant.identity.user)
        return redeem_ticket(grant, origin, self._revocations, self._clock())

    def _log_in(self, grant: Grant | None) -> LoggedIn:
        now, ttl = self._clock(), self._login_token_ttl_s
        login = redeem_login(grant, self._revocations, now)
        token = mint(self._key, login.user, ttl, login.scopes, now_ms=now)
        return LoggedIn(token, (now // 1000 + ttl) * 1000)

    async def _apply(self, changes: Sequence[Change]) -> list[Grant | None]:
        self._be_sure()
        try:
            async with asyncio.timeout(STORE_DEADLINE_S):
                return await self._store.apply(changes, self._clock())
        except (TimeoutError, StoreFailed):
            raise StewardError(
                Reason.STORE_UNAVAILABLE, "the auth store does not answer; try again"
            ) from None

    def _be_sure(self) -> None:
        # Why not is for operators: it may name hosts and roles.
        if self._store.unsure() is not None:
            raise StewardError(
                Reason.STORE_UNAVAILABLE, "the auth store can't be asked right now; try again"
            )
