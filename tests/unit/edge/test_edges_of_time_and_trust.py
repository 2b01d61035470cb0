"""The timer wheel, allowances, credentials, and the allow list of names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.core.rate import Allowance, Strikes
from edge.host.wheel import TICK_MS, TimerWheel
from edge.server.connect import accept_value
from edge.server.credentials import (
    BearerToken,
    Doors,
    Ticket,
    parse_credential,
    parse_subprotocols,
)
from steward.errors import Reason, StewardError


class Sleeper:
    """Records when it is woken; asks for its next deadline if it has one left."""

    def __init__(self, wheel: TimerWheel, deadlines: list[int]) -> None:
        self.wheel_slot = 0
        self.woken: list[int] = []
        self._wheel = wheel
        self._deadlines = deadlines
        self.rest()

    def rest(self) -> None:
        if self._deadlines:
            self._wheel.schedule(self, self._deadlines.pop(0))

    def on_deadline(self, now_ms: int) -> None:
        self.woken.append(now_ms)
        self.rest()


@given(
    deadline=st.integers(1, 100_000),
    steps=st.lists(st.integers(1, 5_000), min_size=1, max_size=50),
)
def test_nobody_is_woken_early_nor_later_than_the_next_turn(
    deadline: int, steps: list[int]
) -> None:
    wheel = TimerWheel(0)
    sleeper = Sleeper(wheel, [deadline])
    now = 0
    for step in steps:
        now += step
        before = len(sleeper.woken)
        wheel.advance(now)
        if now < deadline:
            assert not sleeper.woken
        if now >= deadline + TICK_MS:
            assert len(sleeper.woken) == 1 and before <= 1


def test_a_later_deadline_costs_nothing_and_an_earlier_one_counts() -> None:
    wheel = TimerWheel(0)
    sleeper = Sleeper(wheel, [1000])
    wheel.schedule(sleeper, 5000)
    assert len(wheel) == 1
    wheel.schedule(sleeper, 500)
    wheel.advance(525)
    assert sleeper.woken == [525]
    wheel.advance(2000)
    assert sleeper.woken == [525] and len(wheel) == 0


def test_a_chain_of_deadlines_goes_on() -> None:
    wheel = TimerWheel(0)
    sleeper = Sleeper(wheel, [100, 200, 300])
    for now in range(0, 500, TICK_MS):
        wheel.advance(now)
    assert sleeper.woken == [100, 200, 300]


def test_an_allowance_refills_evenly_and_says_when() -> None:
    allowance = Allowance(60, 0)
    assert all(allowance.take(0) == 0 for _ in range(60))
    assert allowance.take(0) == 1000 and allowance.take(400) == 600
    assert allowance.take(1000) == 0 and allowance.take(1000) == 1000
    assert sum(allowance.take(10_000_000) == 0 for _ in range(100)) == 60


def test_strikes_count_within_a_minute() -> None:
    strikes = Strikes(3)
    assert [strikes.add(t) for t in (0, 1, 60_001, 60_002, 60_003)] == [
        False,
        False,
        False,
        False,
        True,
    ]


def refused(authorizations: list[str], subprotocols: list[str], tickets: list[str]) -> Reason:
    with pytest.raises(StewardError) as caught:
        parse_credential(authorizations, subprotocols, tickets)
    return caught.value.reason


def test_each_kind_of_credential_alone_is_taken() -> None:
    assert parse_credential(["bearer  abc"], [], []) == BearerToken("abc")
    both = parse_subprotocols(["steward.v1, steward.bearer.a.b.c"])
    assert parse_credential([], both, []) == BearerToken("a.b.c")
    assert parse_credential([], ["steward.v1"], ["t1"]) == Ticket("t1")


@pytest.mark.parametrize(
    ("authorizations", "subprotocols", "tickets"),
    [
        ([], [], []),
        (["Bearer a"], [], ["t"]),
        (["Bearer a", "Bearer a"], [], []),
        (["Bearer a"], ["steward.v1", "steward.bearer.a"], []),
        ([], ["steward.v1", "steward.bearer.a"], ["t"]),
        ([], ["steward.v1", "steward.bearer.a", "steward.bearer.b"], []),
        ([], [], ["t", "t"]),
        (["Basic a"], [], []),
        (["Bearer "], [], []),
        ([], ["steward.v1", "steward.bearer."], []),
        ([], [], [""]),
        (["Bearer " + "x" * 9000], [], []),
        (["Bearer \u20ac"], [], []),
    ],
)
def test_none_several_or_malformed_credentials_are_refused(
    authorizations: list[str], subprotocols: list[str], tickets: list[str]
) -> None:
    assert refused(authorizations, subprotocols, tickets) is Reason.TOKEN_INVALID


def test_a_bearer_subprotocol_alone_is_against_the_protocol() -> None:
    assert refused([], ["steward.bearer.a"], []) is Reason.PROTOCOL_VIOLATION


DOORS = Doors(["https://chat.example.org", "http://127.0.0.1:8080/path", "http://[::1]:8080"])


@pytest.mark.parametrize(
    ("origin", "admitted"),
    [
        (None, True),
        ("https://chat.example.org", True),
        ("https://CHAT.example.org:443", True),
        ("http://127.0.0.1:8080", True),
        ("http://[::1]:8080", True),
        ("http://chat.example.org", False),
        ("https://chat.example.org.evil.org", False),
        ("https://chat.example.org:8443", False),
        ("http://127.0.0.1:8081", False),
        ("https://user@chat.example.org", False),
        ("null", False),
        ("", False),
        ("http://[broken", False),
    ],
)
def test_origins_are_compared_exactly(origin: str | None, admitted: bool) -> None:
    assert DOORS.admits_origin(origin) is admitted


@pytest.mark.parametrize(
    ("host", "admitted"),
    [
        ("chat.example.org", True),
        ("chat.example.org:443", True),
        ("127.0.0.1:8080", True),
        ("127.0.0.1", False),
        ("rebound.evil.org:8080", False),
        ("", False),
        (None, False),
    ],
)
def test_host_names_are_compared_exactly(host: str | None, admitted: bool) -> None:
    assert DOORS.admits_host(host) is admitted


def test_the_accept_value_is_that_of_the_rfc() -> None:
    assert accept_value("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
