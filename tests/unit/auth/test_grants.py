"""Tickets, login codes and revocations: the pure rules."""

import pytest

from auth_service.core.grants import (
    LOGIN_TTL_MS,
    MAX_ORIGIN_CHARS,
    MOST_USED,
    TICKET_TTL_MS,
    TicketReplayed,
    UsedTickets,
    digest_of,
    new_login,
    new_ticket,
    redeem_login,
    redeem_ticket,
)
from auth_service.core.revocations import Revocations
from steward.errors import Reason, StewardError
from steward.model.identity import Identity
from steward.model.keys import UserKey

NOW = 1_800_000_000_000
LIFETIME = 1_000_000
ALICE = UserKey("default", "alice")
IDENTITY = Identity(ALICE, ("chat",), NOW + 60_000, NOW - 1000, "t1")
ORIGIN = "https://app.example"


def none_revoked() -> Revocations:
    return Revocations({}, LIFETIME)


def test_a_ticket_stands_for_its_identity_until_thirty_seconds_have_passed() -> None:
    ticket = new_ticket(IDENTITY, "", NOW)
    assert redeem_ticket(ticket, "", none_revoked(), NOW + TICKET_TTL_MS - 1) == IDENTITY
    with pytest.raises(StewardError) as caught:
        redeem_ticket(ticket, "", none_revoked(), NOW + TICKET_TTL_MS)
    assert caught.value.reason is Reason.TOKEN_INVALID


@pytest.mark.parametrize("origin", ["", "https://evil.example", ORIGIN + "/", ORIGIN.upper()])
def test_a_ticket_issued_to_an_origin_is_good_for_that_origin_alone(origin: str) -> None:
    ticket = new_ticket(IDENTITY, ORIGIN, NOW)
    assert redeem_ticket(ticket, ORIGIN, none_revoked(), NOW) == IDENTITY
    with pytest.raises(StewardError) as caught:
        redeem_ticket(ticket, origin, none_revoked(), NOW)
    assert caught.value.reason is Reason.TOKEN_INVALID


def test_a_ticket_issued_without_an_origin_may_come_with_one() -> None:
    assert redeem_ticket(new_ticket(IDENTITY, "", NOW), ORIGIN, none_revoked(), NOW) == IDENTITY


def test_an_origin_that_is_too_long_gets_no_ticket() -> None:
    with pytest.raises(StewardError) as caught:
        new_ticket(IDENTITY, "o" * (MAX_ORIGIN_CHARS + 1), NOW)
    assert caught.value.reason is Reason.PROTOCOL_VIOLATION


def test_a_ticket_does_not_outlive_its_token() -> None:
    short = Identity(ALICE, (), NOW + 10, NOW, "t1")
    with pytest.raises(StewardError) as caught:
        redeem_ticket(new_ticket(short, "", NOW), "", none_revoked(), NOW + 10)
    assert caught.value.reason is Reason.TOKEN_EXPIRED


def test_a_revocation_ends_tickets_and_codes_that_were_made_before_it() -> None:
    revocations = none_revoked()
    ticket, login = new_ticket(IDENTITY, "", NOW), new_login(ALICE, (), NOW)
    revocations.note(ALICE, revocations.next_mark(ALICE, NOW))
    for redeem in (
        lambda: redeem_ticket(ticket, "", revocations, NOW),
        lambda: redeem_login(login, revocations, NOW),
    ):
        with pytest.raises(StewardError) as caught:
            redeem()
        assert caught.value.reason is Reason.TOKEN_REVOKED


def test_a_login_code_is_good_for_ten_minutes() -> None:
    login = new_login(ALICE, ("chat",), NOW)
    assert redeem_login(login, none_revoked(), NOW + LOGIN_TTL_MS - 1) == login
    with pytest.raises(StewardError) as caught:
        redeem_login(login, none_revoked(), NOW + LOGIN_TTL_MS)
    assert caught.value.reason is Reason.TOKEN_INVALID


def test_a_ticket_is_no_login_code_and_a_code_no_ticket() -> None:
    ticket, login = new_ticket(IDENTITY, "", NOW), new_login(ALICE, (), NOW)
    with pytest.raises(StewardError):
        redeem_login(ticket, none_revoked(), NOW)
    with pytest.raises(StewardError):
        redeem_ticket(login, "", none_revoked(), NOW)


def test_unknown_used_and_expired_are_refused_in_the_same_words() -> None:
    words = set()
    for grant, now in ((None, NOW), (new_ticket(IDENTITY, "", NOW), NOW + TICKET_TTL_MS)):
        with pytest.raises(StewardError) as caught:
            redeem_ticket(grant, "", none_revoked(), now)
        words.add(caught.value.message)
    assert len(words) == 1


def test_what_was_issued_in_the_millisecond_of_a_revocation_is_revoked_and_later_is_not() -> None:
    revocations = none_revoked()
    mark = revocations.next_mark(ALICE, NOW)
    revocations.note(ALICE, mark)
    with pytest.raises(StewardError):
        revocations.check(ALICE, NOW)
    revocations.check(ALICE, NOW + 1)


def test_a_revocation_is_of_one_user_of_one_tenant() -> None:
    revocations = Revocations({ALICE: NOW}, LIFETIME)
    with pytest.raises(StewardError):
        revocations.check(ALICE, 0)
    revocations.check(UserKey("default", "bob"), 0)
    revocations.check(UserKey("other", "alice"), 0)


def test_marks_never_go_down_also_when_the_clock_does() -> None:
    revocations = Revocations({ALICE: NOW}, LIFETIME)
    assert revocations.next_mark(ALICE, NOW - 5000) == NOW
    revocations.note(ALICE, NOW - 5000)
    with pytest.raises(StewardError):
        revocations.check(ALICE, NOW - 1)


def test_only_marks_that_a_live_token_could_fall_under_are_relevant() -> None:
    bob = UserKey("default", "bob")
    revocations = Revocations({ALICE: NOW - LIFETIME, bob: NOW - LIFETIME + 1}, LIFETIME)
    assert revocations.relevant(NOW) == [(bob, NOW - LIFETIME + 1)]
    # Not relevant is not forgotten: the clock may have been wrong.
    with pytest.raises(StewardError):
        revocations.check(ALICE, NOW - LIFETIME - 1)


def test_a_used_ticket_is_told_from_a_guess_for_as_long_as_it_is_remembered() -> None:
    used = UsedTickets()
    used.add(digest_of("mine"), ALICE)
    used.check(digest_of("guessed"))
    with pytest.raises(TicketReplayed) as caught:
        used.check(digest_of("mine"))
    assert (caught.value.user, caught.value.reason) == (ALICE, Reason.TOKEN_INVALID)
    for n in range(MOST_USED):
        used.add(digest_of(str(n)), ALICE)
    used.check(digest_of("mine"))
