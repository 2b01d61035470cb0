"""User tokens: made and checked in one place, so that nobody else decides what a good token is.

A token is a JWT signed with EdDSA by the Ed25519 key `<data>/keys/user.key`
(`steward.rpc.keys.load_or_create_key(data, USER_KEY)`). The only algorithm that is
accepted is EdDSA, whatever a token's header says. Every token has an issuer, the
audience `steward`, a subject, an id and a limited life; `iat` carries milliseconds, so
that a revocation and a new login in the same second are told apart.

Tokens of exactly the form that `mint` gives are read here, as PyJWT takes as long around a
signature as the signature itself. Whatever differs in a byte of the header or in the set of
claims is left to PyJWT, so there is one place that knows what else a token may look like.

Guaranteed: `verify` and `genuine` return an identity or raise `StewardError`, for any input,
and no error text repeats any part of a token. Not done here: revocation, which needs state
and belongs to the auth service.
"""

import binascii
import secrets
from collections.abc import Sequence
from typing import Any

import jwt
import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from steward.errors import Reason, StewardError
from steward.model.identity import Identity
from steward.model.keys import DEFAULT_TENANT, UserKey
from steward.runtime.clock import wall_ms

ALGORITHM = "EdDSA"
ISSUER = "steward"
AUDIENCE = "steward"
REQUIRED_CLAIMS = ("iss", "aud", "sub", "exp", "iat", "jti")

MAX_LIFETIME_S = 30 * 24 * 3600
"""No token lives longer. A revocation may be forgotten when this much time has passed."""

MAX_CLOCK_SKEW_MS = 30_000
"""How far in the future `iat` may lie: the clock of the machine that made it may be ahead."""

MAX_TOKEN_CHARS = 8192
MAX_ID_CHARS = 128
MAX_SCOPES = 32

# What `mint` writes before the first dot, and the claims that it may put behind it.
_HEAD = "eyJhbGciOiJFZERTQSIsInR5cCI6IkpXVCJ9."
_CLAIMS = frozenset((*REQUIRED_CLAIMS, "tid", "scope"))
_STANDARD = bytes.maketrans(b"-_", b"+/")
_NOT_OURS = "it is malformed or was not signed by this cluster"

# RFC 6749, 3.3: printable ASCII without space, quote and backslash.
_SCOPE_CHARS = frozenset(chr(c) for c in range(0x21, 0x7F)) - {'"', "\\"}


def is_id(text: str) -> bool:
    """Whether `text` can be a tenant or user id: 1 to 128 printable characters."""
    return 1 <= len(text) <= MAX_ID_CHARS and text.isprintable()


def is_scope(text: str) -> bool:
    """Whether `text` can be one scope: 1 to 128 characters of RFC 6749's scope-token."""
    return 1 <= len(text) <= MAX_ID_CHARS and _SCOPE_CHARS.issuperset(text)


def check_subject(user: UserKey, scopes: Sequence[str]) -> None:
    """Raises ValueError, in words for an operator, when no token can be made for these."""
    if not is_id(user.tenant):
        raise ValueError(f"a tenant id has 1 to {MAX_ID_CHARS} printable characters")
    if not is_id(user.user):
        raise ValueError(f"a user id has 1 to {MAX_ID_CHARS} printable characters")
    if len(scopes) > MAX_SCOPES or not all(map(is_scope, scopes)):
        raise ValueError(f"scopes are at most {MAX_SCOPES} words without spaces or quotes")


def mint(
    key: Ed25519PrivateKey,
    user: UserKey,
    ttl_seconds: int,
    scopes: Sequence[str] = (),
    *,
    now_ms: int | None = None,
) -> str:
    """A new token for `user`, good for `ttl_seconds` (1 to 30 days) from now.

    `now_ms` is Unix milliseconds, by default the wall clock. Raises ValueError for ids,
    scopes or a life that no token may have.
    """
    check_subject(user, scopes)
    if not 1 <= ttl_seconds <= MAX_LIFETIME_S:
        raise ValueError(f"a token lives 1 to {MAX_LIFETIME_S} seconds")
    issued_ms = wall_ms() if now_ms is None else now_ms
    claims: dict[str, Any] = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": user.user,
        "tid": user.tenant,
        "iat": issued_ms / 1000,
        "exp": issued_ms // 1000 + ttl_seconds,
        "jti": secrets.token_hex(16),
    }
    if scopes:
        claims["scope"] = " ".join(scopes)
    return jwt.encode(claims, key, algorithm=ALGORITHM)


def verify(public_key: Ed25519PublicKey, token: str, *, now_ms: int | None = None) -> Identity:
    """Who the holder of `token` is.

    `now_ms` is Unix milliseconds, by default the wall clock. Raises StewardError with
    TOKEN_EXPIRED for a genuine token whose time is over, else with TOKEN_INVALID.
    """
    return check_times(genuine(public_key, token), wall_ms() if now_ms is None else now_ms)


def genuine(public_key: Ed25519PublicKey, token: str) -> Identity:
    """Who `token` names, once its signature and claims are good. Raises StewardError.

    The same at any time, so it may be kept; whether the token counts now, `check_times` says.
    """
    if len(token) > MAX_TOKEN_CHARS:
        raise _invalid("it is too long")
    claims = _read_own(public_key, token)
    return _identity(_read_any(public_key, token) if claims is None else claims)


def check_times(identity: Identity, now_ms: int) -> Identity:
    """The same identity. Raises StewardError: TOKEN_EXPIRED, or TOKEN_INVALID when too early."""
    if identity.issued_at_ms > now_ms + MAX_CLOCK_SKEW_MS:
        raise _invalid("it was issued in the future; check the clocks")
    if identity.expires_at_ms <= now_ms:
        raise StewardError(Reason.TOKEN_EXPIRED, "the token has expired; get a new one")
    return identity


def _read_own(public_key: Ed25519PublicKey, token: str) -> dict[str, Any] | None:
    """The claims of a token as `mint` makes them; None if it is anything else. Raises StewardError.

    Nothing in the payload is looked at before the signature over it is found good.
    """
    signed, dot, signature = token.rpartition(".")
    if not dot or not token.startswith(_HEAD) or "." in (payload := signed[len(_HEAD) :]):
        return None
    try:
        public_key.verify(_decoded(signature), signed.encode("ascii"))
        claims = orjson.loads(_decoded(payload))
    except InvalidSignature:
        raise _invalid(_NOT_OURS) from None
    except ValueError:
        return None
    if not isinstance(claims, dict) or not _CLAIMS.issuperset(claims):
        return None
    own = claims.get("iss") == ISSUER and claims.get("aud") == AUDIENCE
    return claims if own and all(name in claims for name in REQUIRED_CLAIMS) else None


def _decoded(segment: str) -> bytes:
    """The bytes of a base64url segment. Raises ValueError for any other character."""
    padded = segment.encode("ascii").translate(_STANDARD) + b"=" * (-len(segment) % 4)
    return binascii.a2b_base64(padded, strict_mode=True)


def _read_any(public_key: Ed25519PublicKey, token: str) -> dict[str, Any]:
    """The claims of any token that this cluster signed. Raises StewardError."""
    try:
        claims: dict[str, Any] = jwt.decode(
            token,
            public_key,
            algorithms=[ALGORITHM],
            audience=AUDIENCE,
            issuer=ISSUER,
            # Times are checked by `check_times`, against the caller's clock and in milliseconds.
            options={"require": list(REQUIRED_CLAIMS), "verify_exp": False, "verify_iat": False},
        )
    except jwt.InvalidAudienceError:
        raise _invalid("it was made for another audience") from None
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
        # Not the library's own message: it quotes the token's header. And whatever else a
        # hostile header raises inside of its JSON parser is a refusal, not a crash.
        raise _invalid(_NOT_OURS) from None
    return claims


def _identity(claims: dict[str, Any]) -> Identity:
    user = UserKey(_text(claims, "tid", DEFAULT_TENANT), _text(claims, "sub"))
    scopes = tuple(_text(claims, "scope", "").split())
    token_id = _text(claims, "jti")
    issued_ms, expires_ms = _time_ms(claims, "iat"), _time_ms(claims, "exp")
    try:
        check_subject(user, scopes)
    except ValueError as error:
        raise _invalid(str(error)) from None
    if not is_id(token_id):
        raise _invalid("its id is not usable")
    if expires_ms - issued_ms > MAX_LIFETIME_S * 1000:
        raise _invalid("it lives too long")
    return Identity(user, scopes, expires_ms, issued_ms, token_id)


def _text(claims: dict[str, Any], name: str, default: str | None = None) -> str:
    value = claims.get(name, default)
    if not isinstance(value, str):
        raise _invalid("a claim has the wrong type")
    return value


def _time_ms(claims: dict[str, Any], name: str) -> int:
    value = claims[name]
    # The range also keeps out NaN and infinity, which JSON parsers let through.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1 << 40:
        raise _invalid("a claim has the wrong type")
    return round(value * 1000)


def _invalid(why: str) -> StewardError:
    return StewardError(Reason.TOKEN_INVALID, f"the token is not accepted: {why}")
