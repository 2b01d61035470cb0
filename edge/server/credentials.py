"""Who a request claims to be, and from where: rules over headers, without I/O.

Exactly one credential is taken: a bearer token, a bearer subprotocol, or a ticket. Two of
them are refused, since nobody can say which one counts. Origins and Host names are
compared with an allow list, exactly.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from steward.errors import Reason, StewardError

SUBPROTOCOL: Final = "steward.v1"
_BEARER_SUBPROTOCOL: Final = "steward.bearer."
_BEARER: Final = "bearer "
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
MAX_CREDENTIAL_CHARACTERS: Final = 8192


@dataclass(frozen=True, slots=True)
class BearerToken:
    token: str


@dataclass(frozen=True, slots=True)
class Ticket:
    ticket: str


def parse_subprotocols(headers: Iterable[str]) -> list[str]:
    """The names in all `Sec-WebSocket-Protocol` headers, in order."""
    return [name for header in headers for part in header.split(",") if (name := part.strip())]


def parse_credential(
    authorizations: Sequence[str], subprotocols: Sequence[str], tickets: Sequence[str]
) -> BearerToken | Ticket:
    """The one credential of a request.

    Raises StewardError: TOKEN_INVALID for none or several, PROTOCOL_VIOLATION for a
    bearer subprotocol without `steward.v1`, which alone may be echoed.
    """
    bearers = [name for name in subprotocols if name.startswith(_BEARER_SUBPROTOCOL)]
    if bearers and SUBPROTOCOL not in subprotocols:
        raise StewardError(
            Reason.PROTOCOL_VIOLATION, f"a bearer subprotocol needs {SUBPROTOCOL} beside it"
        )
    if len(authorizations) + len(bearers) + len(tickets) != 1:
        raise StewardError(Reason.TOKEN_INVALID, "send exactly one credential: a token or a ticket")
    if tickets:
        return Ticket(_checked(tickets[0]))
    if bearers:
        return BearerToken(_checked(bearers[0].removeprefix(_BEARER_SUBPROTOCOL)))
    header = authorizations[0]
    if header[: len(_BEARER)].lower() != _BEARER:
        raise StewardError(Reason.TOKEN_INVALID, "the authorization is not a bearer token")
    return BearerToken(_checked(header[len(_BEARER) :].strip()))


def _checked(secret: str) -> str:
    if not 0 < len(secret) <= MAX_CREDENTIAL_CHARACTERS or not secret.isascii():
        raise StewardError(Reason.TOKEN_INVALID, "the credential is empty or malformed")
    return secret


class Doors:
    """The origins whose pages may talk to this edge, and the Host names that it answers to."""

    __slots__ = ("_hosts", "_origins")

    def __init__(self, urls: Iterable[str]) -> None:
        """`urls` are origins, `http://name:port`; a path in them is ignored."""
        origins = {origin for url in urls if (origin := normal_origin(url))}
        self._origins = frozenset(origins)
        self._hosts = frozenset(urlsplit(origin).netloc for origin in origins)

    def admits_origin(self, origin: str | None) -> bool:
        """Whether this `Origin` may come in. None: it was not sent, as by non-browsers."""
        return origin is None or normal_origin(origin) in self._origins

    def admits_host(self, host: str | None) -> bool:
        """Whether this `Host` is one of ours (else it may be a rebound name)."""
        if not host:
            return False
        return any(_normal_host(host, scheme) in self._hosts for scheme in _DEFAULT_PORTS)


def normal_origin(url: str) -> str:
    """`scheme://name[:port]` in lower case without a default port; empty if it is none."""
    try:
        parts = urlsplit(url)
        scheme = parts.scheme.lower()
        if scheme not in _DEFAULT_PORTS or not parts.netloc or "@" in parts.netloc:
            return ""
        return f"{scheme}://{_normal_host(parts.netloc, scheme)}"
    except ValueError:
        return ""


def _normal_host(netloc: str, scheme: str) -> str:
    return netloc.lower().removesuffix(f":{_DEFAULT_PORTS[scheme]}")
