"""User tokens: what is accepted, what is refused, and what a refusal says."""

import base64
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from steward.errors import Reason, StewardError
from steward.model.keys import UserKey
from steward.tokens import (
    MAX_CLOCK_SKEW_MS,
    MAX_LIFETIME_S,
    MAX_TOKEN_CHARS,
    is_id,
    mint,
    verify,
)

KEY = Ed25519PrivateKey.generate()
OTHER_KEY = Ed25519PrivateKey.generate()
ALICE = UserKey("acme", "alice")
NOW_MS = 1_800_000_000_123


def claims(**changes: Any) -> dict[str, Any]:
    """Good claims, with changes; None takes a claim away."""
    good = {
        "iss": "steward",
        "aud": "steward",
        "sub": "alice",
        "iat": NOW_MS // 1000,
        "exp": NOW_MS // 1000 + 60,
        "jti": "t1",
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def sign(**changes: Any) -> str:
    return jwt.encode(claims(**changes), KEY, algorithm="EdDSA")


def refusal_of(token: str, now_ms: int = NOW_MS) -> StewardError:
    with pytest.raises(StewardError) as caught:
        verify(KEY.public_key(), token, now_ms=now_ms)
    return caught.value


def unsigned(header: dict[str, Any], signature: str = "") -> str:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part(header)}.{part(claims())}.{signature}"


def test_a_minted_token_names_its_user_scopes_and_times() -> None:
    token = mint(KEY, ALICE, 60, ["chat", "history:read"], now_ms=NOW_MS)
    identity = verify(KEY.public_key(), token, now_ms=NOW_MS)
    assert identity.user == ALICE
    assert identity.scopes == ("chat", "history:read")
    assert identity.issued_at_ms == NOW_MS
    assert identity.expires_at_ms == (NOW_MS // 1000 + 60) * 1000
    assert len(identity.token_id) == 32


def test_two_tokens_of_one_user_have_different_ids() -> None:
    ids = {verify(KEY.public_key(), mint(KEY, ALICE, 60)).token_id for _ in range(2)}
    assert len(ids) == 2


def test_a_token_without_tenant_and_scope_is_of_the_default_tenant_and_has_no_scopes() -> None:
    identity = verify(KEY.public_key(), sign(), now_ms=NOW_MS)
    assert identity.user == UserKey("default", "alice")
    assert identity.scopes == ()


def test_a_token_is_good_until_the_millisecond_before_its_end() -> None:
    token = mint(KEY, ALICE, 60, now_ms=NOW_MS)
    end = (NOW_MS // 1000 + 60) * 1000
    assert verify(KEY.public_key(), token, now_ms=end - 1).user == ALICE
    assert refusal_of(token, end).reason is Reason.TOKEN_EXPIRED


def test_an_expired_token_of_another_key_is_invalid_not_expired() -> None:
    token = mint(OTHER_KEY, ALICE, 60, now_ms=NOW_MS)
    assert refusal_of(token, NOW_MS + 3_600_000).reason is Reason.TOKEN_INVALID


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": "other"},
        {"aud": ["other", "another"]},
        {"aud": None},
        {"iss": "somebody"},
        {"iss": None},
        {"sub": None},
        {"sub": ""},
        {"sub": "x" * 129},
        {"sub": "a\x00b"},
        {"sub": "line\nbreak"},
        {"sub": "\u202eevil"},
        {"tid": ""},
        {"tid": "a\tb"},
        {"tid": 7},
        {"exp": None},
        {"exp": True},
        {"exp": "9999999999"},
        {"exp": 1e300},
        {"exp": float("inf")},
        {"exp": float("nan")},
        {"exp": NOW_MS // 1000 + MAX_LIFETIME_S + 60},
        {"iat": None},
        {"iat": -1},
        {"iat": (NOW_MS + MAX_CLOCK_SKEW_MS) // 1000 + 2},
        {"jti": None},
        {"jti": ""},
        {"scope": ["chat"]},
        {"scope": 'say"hi"'},
        {"scope": " ".join(["s"] * 33)},
    ],
    ids=str,
)
def test_a_genuine_token_with_a_claim_out_of_rule_is_invalid(changes: dict[str, Any]) -> None:
    assert refusal_of(sign(**changes)).reason is Reason.TOKEN_INVALID


def test_a_numeric_subject_is_invalid() -> None:
    # The library refuses to encode one, so the payload is signed by hand.
    token = jwt.PyJWS().encode(json.dumps(claims(sub=7)).encode(), KEY, algorithm="EdDSA")
    assert refusal_of(token).reason is Reason.TOKEN_INVALID


def test_a_token_of_another_key_is_invalid() -> None:
    assert refusal_of(mint(OTHER_KEY, ALICE, 60)).reason is Reason.TOKEN_INVALID


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", ""])
def test_an_unsigned_token_is_invalid(algorithm: str) -> None:
    assert refusal_of(unsigned({"alg": algorithm, "typ": "JWT"})).reason is Reason.TOKEN_INVALID


@pytest.mark.parametrize("form", ["pem", "raw"])
def test_the_public_key_is_no_hmac_secret(form: str) -> None:
    public = KEY.public_key()
    secret = (
        public.public_bytes_raw()
        if form == "raw"
        else public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    signing_input = unsigned({"alg": "HS256", "typ": "JWT"}).rstrip(".")
    hmac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    signature = base64.urlsafe_b64encode(hmac.sign(signing_input.encode(), secret))
    token = f"{signing_input}.{signature.rstrip(b'=').decode()}"
    assert refusal_of(token).reason is Reason.TOKEN_INVALID


def test_a_header_that_names_another_algorithm_over_a_good_signature_is_invalid() -> None:
    _, body, signature = sign().split(".")
    header = unsigned({"alg": "ES256", "typ": "JWT"}).split(".")[0]
    assert refusal_of(f"{header}.{body}.{signature}").reason is Reason.TOKEN_INVALID


def test_a_header_of_a_thousand_brackets_is_invalid_and_no_crash() -> None:
    header = base64.urlsafe_b64encode(b"[" * 3000).decode().rstrip("=")
    assert refusal_of(f"{header}.e30.e30").reason is Reason.TOKEN_INVALID


def test_a_token_that_is_too_long_is_refused_before_it_is_parsed() -> None:
    assert "too long" in refusal_of("x" * (MAX_TOKEN_CHARS + 1)).message


@given(st.text(max_size=300))
def test_no_text_is_a_token_and_none_raises_anything_else(text: str) -> None:
    assert refusal_of(text).reason is Reason.TOKEN_INVALID


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_bit_anywhere_never_makes_another_user(place: int, flip: int) -> None:
    token = bytearray(mint(KEY, ALICE, 60, ["chat"], now_ms=NOW_MS).encode())
    token[place % len(token)] ^= flip
    try:
        identity = verify(KEY.public_key(), token.decode("latin-1"), now_ms=NOW_MS)
    except StewardError:
        return
    # Base64 has spare bits, so another spelling of the same token may pass, as the same user.
    assert (identity.user, identity.scopes) == (ALICE, ("chat",))


def test_no_refusal_repeats_a_part_of_the_token() -> None:
    canary = "canary-4711"
    tokens = [
        sign(aud=canary),
        sign(iss=canary),
        sign(sub=canary + "\n"),
        sign(tid=canary + "\x00"),
        sign(scope=canary + '"'),
        sign(jti=canary + "\x7f"),
        unsigned({"alg": canary}),
        canary,
    ]
    for token in tokens:
        error = refusal_of(token)
        assert canary not in error.message and canary not in str(error)
        assert error.__context__ is None or error.__suppress_context__


@pytest.mark.parametrize(
    ("user", "ttl", "scopes"),
    [
        (UserKey("default", ""), 60, []),
        (UserKey("default", "x" * 129), 60, []),
        (UserKey("", "alice"), 60, []),
        (UserKey("default", "a\nb"), 60, []),
        (ALICE, 0, []),
        (ALICE, -5, []),
        (ALICE, MAX_LIFETIME_S + 1, []),
        (ALICE, 60, ["two words"]),
        (ALICE, 60, [""]),
        (ALICE, 60, ["s"] * 33),
    ],
)
def test_a_token_that_would_be_refused_is_not_minted(
    user: UserKey, ttl: int, scopes: list[str]
) -> None:
    with pytest.raises(ValueError):
        mint(KEY, user, ttl, scopes)


@given(st.text(min_size=1, max_size=128).filter(is_id), st.text(min_size=1).filter(is_id))
def test_every_printable_id_survives_the_round_trip(user: str, tenant: str) -> None:
    key = UserKey(tenant, user)
    assert verify(KEY.public_key(), mint(KEY, key, 60)).user == key
