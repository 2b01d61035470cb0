"""The handshakes: `GET /v1/connect` (WebSocket) and `GET /v1/events` (Server-Sent Events).

Identity, origin and limits are decided before the upgrade; the answer is written by hand
and the transport handed to the hub. Nothing is negotiated: no extension, no compression.

Two callers: aiohttp's application, and `edge.server.door` for WebSockets, which does the same
steps without a task.
"""

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import HttpVersion, hdrs, web
from multidict import CIMultiDictProxy, MultiMapping

from edge.core.resume import (
    ResumePoint,
    is_id,
    parse_last_event_id,
    parse_merge,
    parse_resume,
)
from edge.host.hub import Hub
from edge.host.spans import Arrival
from edge.server.credentials import (
    SUBPROTOCOL,
    BearerToken,
    Ticket,
    parse_credential,
    parse_subprotocols,
)
from edge.server.takeover import TakenOver, detach, transport_of
from edge.uplink.port import TicketReplayed
from steward.errors import Reason, StewardError
from steward.model.identity import Identity
from steward.model.violations import ViolationKind
from steward.telemetry.catalog import EdgeMetrics

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_HTTP_1_1 = HttpVersion(1, 1)
TRACEPARENT = "traceparent"
_UPGRADED = (
    "HTTP/1.1 101 Switching Protocols\r\n"
    "Upgrade: websocket\r\n"
    "Connection: Upgrade\r\n"
    "Sec-WebSocket-Accept: %s\r\n"
    "%s\r\n"
)
_SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    b"Content-Type: text/event-stream\r\n"
    b"Cache-Control: no-store\r\n"
    b"X-Content-Type-Options: nosniff\r\n"
    b"X-Accel-Buffering: no\r\n"
    b"Connection: close\r\n\r\n"
)


class Asked(Protocol):
    """The head of a request, as aiohttp has read and checked it. `web.Request` is one."""

    @property
    def headers(self) -> CIMultiDictProxy[str]: ...

    @property
    def query(self) -> MultiMapping[str]: ...

    @property
    def version(self) -> HttpVersion: ...

    @property
    def path(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Handshake:
    """A connection that may be opened, once it is known whose it is."""

    answer: bytes
    credential: BearerToken | Ticket
    origin: str
    path: str
    point: ResumePoint
    client_id: str
    websocket: bool
    merge: bool = False
    arrival: Arrival = field(default_factory=Arrival)


class Connect:
    """Both handshakes of one edge."""

    def __init__(self, hub: Hub, metrics: EdgeMetrics) -> None:
        self._hub = hub
        self._handshakes = metrics.handshakes
        self._accepted = metrics.handshakes.labels(result="accepted")

    async def websocket(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/connect`. Raises StewardError instead of upgrading."""
        return await self._open(request, read_websocket)

    async def events(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/events`. Raises StewardError instead of streaming."""
        return await self._open(request, read_events)

    async def _open(
        self, request: web.Request, read: Callable[[Asked], Handshake]
    ) -> web.StreamResponse:
        handshake: Handshake | None = None
        try:
            if request.body_exists:
                # Its bytes could not be told from frames once the transport has changed hands.
                raise StewardError(Reason.PROTOCOL_VIOLATION, "this request has no body")
            handshake = read(request)
            identity = await self.identify(handshake)
            self.check(handshake, identity)
            transport = transport_of(request)
            if transport is not None:  # Else the client did not wait for the answer.
                self.take(handshake, identity, transport, detach(request, transport))
            return TakenOver()
        except StewardError as error:
            self.refused(handshake, error)
            raise

    def identify(self, handshake: Handshake) -> "asyncio.Future[Identity]":
        """Whose handshake it is. The future ends by itself, with StewardError at the latest."""
        arrival = handshake.arrival
        self._hub.spans.arrive(arrival)
        return identity_of(self._hub, handshake.credential, handshake.origin, arrival)

    def check(self, handshake: Handshake, identity: Identity) -> None:
        """Raises StewardError when this user may not open one more connection here."""
        refusal = self._hub.refusal(identity.user, handshake.client_id)
        if refusal is not None:
            raise refusal

    def take(
        self,
        handshake: Handshake,
        identity: Identity,
        transport: asyncio.Transport,
        received: bytes,
    ) -> None:
        """Answer, and give the transport to the hub, in the turn of `check`."""
        transport.write(handshake.answer)
        self._hub.connect(
            transport,
            identity,
            handshake.point,
            handshake.client_id,
            websocket=handshake.websocket,
            merge=handshake.merge,
            received=received,
            arrival=handshake.arrival,
        )
        self._accepted.inc()

    def refused(self, handshake: Handshake | None, error: StewardError) -> None:
        """Count a handshake that was refused; a ticket that came twice is put on record."""
        if handshake is not None and isinstance(error, TicketReplayed):
            text = f"it came again at {handshake.path!r}"
            self._hub.report(ViolationKind.REPLAYED_TICKET, text, error.user)
        self._handshakes.labels(result=error.reason.value).inc()


def read_websocket(asked: Asked) -> Handshake:
    """The handshake of `GET /v1/connect`. Raises StewardError."""
    headers, query = asked.headers, asked.query
    key = _websocket_key(asked)
    point, client_id = _resume(query)
    merge = parse_merge(one(query, "merge"))
    subprotocols = parse_subprotocols(headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, ()))
    chosen = f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n" if SUBPROTOCOL in subprotocols else ""
    answer = _UPGRADED % (accept_value(key), chosen)
    credential = credential_of(asked, subprotocols)
    origin = headers.get(hdrs.ORIGIN, "")
    arrival = Arrival.of(headers.get(TRACEPARENT, ""))
    answered = answer.encode()
    return Handshake(
        answered, credential, origin, asked.path, point, client_id, True, merge, arrival
    )


def read_events(asked: Asked) -> Handshake:
    """The handshake of `GET /v1/events`. Raises StewardError."""
    headers, query = asked.headers, asked.query
    point, client_id = _resume(query)
    if parse_merge(one(query, "merge")):
        raise StewardError(Reason.PROTOCOL_VIOLATION, "merge=1 is for WebSockets; leave it out")
    last = headers.get("Last-Event-ID", "")
    if last:
        point = parse_last_event_id(last)
    origin = headers.get(hdrs.ORIGIN, "")
    arrival = Arrival.of(headers.get(TRACEPARENT, ""))
    credential = credential_of(asked)
    return Handshake(
        _SSE_HEAD, credential, origin, asked.path, point, client_id, False, arrival=arrival
    )


def credential_of(asked: Asked, subprotocols: Sequence[str] = ()) -> BearerToken | Ticket:
    """The one credential of a handshake. Raises StewardError."""
    authorizations = asked.headers.getall(hdrs.AUTHORIZATION, ())
    return parse_credential(authorizations, subprotocols, asked.query.getall("ticket", ()))


def identity_of(
    hub: Hub, credential: BearerToken | Ticket, origin: str, arrival: Arrival
) -> "asyncio.Future[Identity]":
    """Ask auth. The future ends by itself, with StewardError at the latest."""
    trace = hub.spans.asked(arrival)
    if isinstance(credential, BearerToken):
        return hub.auth.check_token(credential.token, trace)
    return hub.auth.redeem_ticket(credential.ticket, origin, trace)


async def identify(hub: Hub, request: web.Request, arrival: Arrival | None = None) -> Identity:
    """Who this plain request is of, by its bearer token. Raises StewardError.

    `arrival`: of one that is traced.
    """
    credential = parse_credential(request.headers.getall(hdrs.AUTHORIZATION, ()), (), ())
    return await identity_of(hub, credential, "", arrival or Arrival())


def accept_value(key: str) -> str:
    """`Sec-WebSocket-Accept` for a key."""
    # RFC 6455 names SHA-1 here; it protects nothing.
    digest = hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


def _websocket_key(asked: Asked) -> str:
    """The key of a proper upgrade request. Raises StewardError(PROTOCOL_VIOLATION)."""
    headers = asked.headers
    upgrade = headers.get(hdrs.UPGRADE, "").strip().lower() == "websocket"
    options = ",".join(headers.getall(hdrs.CONNECTION, ())).lower().split(",")
    if not upgrade or "upgrade" not in [option.strip() for option in options]:
        raise StewardError(Reason.PROTOCOL_VIOLATION, "this is a WebSocket; ask for an upgrade")
    if asked.version < _HTTP_1_1 or headers.get(hdrs.SEC_WEBSOCKET_VERSION, "") != "13":
        raise StewardError(Reason.PROTOCOL_VIOLATION, "WebSocket version 13 over HTTP/1.1 only")
    key = headers.get(hdrs.SEC_WEBSOCKET_KEY, "").strip()
    try:
        size = len(base64.b64decode(key, validate=True))
    except (binascii.Error, ValueError):
        size = 0
    if size != 16:
        raise StewardError(Reason.PROTOCOL_VIOLATION, "Sec-WebSocket-Key is not 16 bytes")
    return key


def one(query: MultiMapping[str], name: str) -> str | None:
    """A query field that may occur once. Raises StewardError(PROTOCOL_VIOLATION)."""
    if not query:
        return None
    values = query.getall(name, ())
    if len(values) > 1:
        raise StewardError(Reason.PROTOCOL_VIOLATION, f"{name} is given twice")
    return values[0] if values else None


def _resume(query: MultiMapping[str]) -> tuple[ResumePoint, str]:
    """Where to begin, and the client's id. Raises StewardError(PROTOCOL_VIOLATION)."""
    point = parse_resume(one(query, "after"), one(query, "stream"))
    client_id = one(query, "client")
    if client_id is not None and not is_id(client_id):
        raise StewardError(Reason.PROTOCOL_VIOLATION, "client is not an id")
    return point, client_id or ""
