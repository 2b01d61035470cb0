"""The text of an evidence, as it may be kept and shown: one line, bounded, and without secrets.

Evidence is written by whoever saw something odd, often from what a stranger sent. What
looks like a token, a ticket or a password is left out; it is a net under the rule that nobody
puts one there, not a replacement of it.
"""

import re

MOST_BYTES = 4096
REDACTED = "(secret)"

_CUT = "..."
_SECRETS = re.compile(
    # A JWT, also a part of one; what follows a word that announces a secret; and any opaque word
    # of the length that one-use tickets have.
    r"eyJ[\w-]{5,}(?:\.[\w-]*)*"
    r"|(?i:\b(?:bearer|basic)\s+)[^\s\"',;]+"
    r"|(?i:\b(?:access_token|token|ticket|secret|password|passwd|authorization|cookie|code)"
    r"[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&]+"
    r"|\b[\w-]{40,}"
)
# What every match of the above contains: most texts have none, and then need no search.
_SIGNS = (
    "eyj",
    "bearer",
    "basic",
    "token",
    "ticket",
    "secret",
    "passw",
    "authoriz",
    "cookie",
    "code",
)
_OPAQUE = re.compile(r"[\w-]{40}")
_NAMED = re.compile(r"^(?:bearer|basic)\s+|^[\w]+[\"']?\s*[=:]\s*[\"']?", re.IGNORECASE)


def clean(text: str) -> str:
    """`text` without secrets, on one line, at most 4096 bytes of UTF-8. Safe to call twice."""
    # Cut first: what is thrown away needs no search, and a search over it could be made slow.
    text = text[: 2 * MOST_BYTES]
    lowered = text.lower()
    if any(sign in lowered for sign in _SIGNS) or _OPAQUE.search(text):
        text = _SECRETS.sub(_redact, text)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= MOST_BYTES:
        return encoded.decode()
    return encoded[: MOST_BYTES - len(_CUT)].decode("utf-8", "ignore") + _CUT


def _redact(found: "re.Match[str]") -> str:
    named = _NAMED.match(found[0])
    return (named[0] if named else "") + REDACTED
