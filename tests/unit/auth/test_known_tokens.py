"""A kept token is only a saved signature: times count anew, and what was refused is not kept."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from auth_service.known import KnownTokens
from steward.errors import Reason, StewardError
from steward.model.keys import DEFAULT_TENANT, UserKey
from steward.tokens import MAX_CLOCK_SKEW_MS, mint, verify

NOW_MS = 1_800_000_000_000
KEY = Ed25519PrivateKey.generate()


class CountedKey:
    """The public key, counting the signatures that it checked."""

    def __init__(self) -> None:
        self.checked = 0

    def verify(self, signature: bytes, data: bytes) -> None:
        self.checked += 1
        KEY.public_key().verify(signature, data)


def known(most: int = 100) -> tuple[KnownTokens, CountedKey]:
    key = CountedKey()
    as_key: Ed25519PublicKey = key  # type: ignore[assignment]
    return KnownTokens(as_key, most), key


def token_of(name: str, ttl_s: int = 60) -> str:
    return mint(KEY, UserKey(DEFAULT_TENANT, name), ttl_s, ("read",), now_ms=NOW_MS)


def reason_of(tokens: KnownTokens, token: str, now_ms: int) -> Reason:
    with pytest.raises(StewardError) as refused:
        tokens.verify(token, now_ms)
    return refused.value.reason


def test_the_second_time_costs_no_signature_and_says_the_same() -> None:
    tokens, key = known()
    token = token_of("alice")
    first, second = (tokens.verify(token, NOW_MS) for _ in range(2))
    assert first == second == verify(KEY.public_key(), token, now_ms=NOW_MS)
    assert key.checked == 1


def test_a_known_token_expires_all_the_same() -> None:
    tokens, _ = known()
    token = token_of("alice")
    tokens.verify(token, NOW_MS + 59_999)
    assert reason_of(tokens, token, NOW_MS + 60_000) is Reason.TOKEN_EXPIRED
    assert len(tokens) == 0


def test_a_known_token_is_too_early_when_the_clock_went_back() -> None:
    tokens, _ = known()
    token = token_of("alice")
    tokens.verify(token, NOW_MS)
    assert reason_of(tokens, token, NOW_MS - MAX_CLOCK_SKEW_MS - 1) is Reason.TOKEN_INVALID


def test_a_token_that_differs_from_a_known_one_in_its_signature_is_refused() -> None:
    tokens, _ = known()
    token = token_of("alice")
    tokens.verify(token, NOW_MS)
    other = token_of("alice")
    forged = f"{token.rpartition('.')[0]}.{other.rpartition('.')[2]}"
    for _ in range(2):
        assert reason_of(tokens, forged, NOW_MS) is Reason.TOKEN_INVALID
    assert len(tokens) == 1


@pytest.mark.parametrize("text", ["", "x", "a.b.c", "\udc80", "\N{SNOWMAN}" * 10, "." * 9000])
def test_what_is_no_token_is_refused_and_not_kept(text: str) -> None:
    tokens, _ = known()
    assert reason_of(tokens, text, NOW_MS) is Reason.TOKEN_INVALID
    assert len(tokens) == 0


def test_the_one_not_asked_for_the_longest_goes_first() -> None:
    tokens, key = known(most=2)
    alice, bob, carol = map(token_of, ("alice", "bob", "carol"))
    for token in (alice, bob, alice, carol):
        tokens.verify(token, NOW_MS)
    assert (len(tokens), key.checked) == (2, 3)
    tokens.verify(alice, NOW_MS)
    assert key.checked == 3
    tokens.verify(bob, NOW_MS)
    assert key.checked == 4
