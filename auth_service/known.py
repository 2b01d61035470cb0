"""Tokens whose signature was found good, so that a client that comes back costs no signature.

An edge that ends sends thousands of clients to the others, with the tokens that they had.
Kept is what a token says (`steward.tokens.genuine`), never that it counts: its times are
looked at for every question, and revocation is the caller's part as for any other identity.
What was refused is not kept, so only who holds good tokens can fill it. The secret itself is
not kept either: entries go by its SHA-256.
"""

from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from steward.model.identity import Identity
from steward.tokens import check_times, genuine

MOST_TOKENS = 16_384
"""About 15 MB; the one that was not asked for the longest goes first."""


class KnownTokens:
    """`verify` of `steward.tokens` for one key, with a memory. One event loop; no locks."""

    def __init__(self, key: Ed25519PublicKey, most: int = MOST_TOKENS) -> None:
        """At most `most` tokens (1 or more) are kept."""
        self._key = key
        self._most = most
        # In the order of their last use.
        self._identities: dict[bytes, Identity] = {}

    def __len__(self) -> int:
        return len(self._identities)

    def verify(self, token: str, now_ms: int) -> Identity:
        """Who the holder of `token` is at `now_ms` (Unix). Raises StewardError."""
        digest = sha256(token.encode("utf-8", "surrogatepass")).digest()
        identity = self._identities.pop(digest, None) or genuine(self._key, token)
        check_times(identity, now_ms)
        if len(self._identities) >= self._most:
            del self._identities[next(iter(self._identities))]
        self._identities[digest] = identity
        return identity
