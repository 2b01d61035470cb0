"""The handshakes: `GET /v1/connect` (WebSocket) and `GET /v1/events` (Server-Sent Events).

Identity, origin and limits are decided before the upgrade; the answer is written by hand
and the transport handed to the hub. Nothing is negotiated: no extension, no compression.
"""

import base64
import binascii
import hashlib
from collections.abc import Sequence

from aiohttp import hdrs, web

from edge.core.resume import (
    ResumePoint,
    is_id,
    parse_last_event_id,
    parse_merge,
    parse_resume,
)
from edge.host.hub import Hub
from edge.server.credentials import (
    SUBPROTOCOL,
    BearerToken,
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
_SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    b"Content-Type: text/event-stream\r\n"
    b"Cache-Control: no-store\r\n"
    b"X-Content-Type-Options: nosniff\r\n"
    b"X-Accel-Buffering: no\r\n"
    b"Connection: close\r\n\r\n"
)


class Connect:
    """Both handshakes of one edge."""

    def __init__(self, hub: Hub, metrics: EdgeMetrics) -> None:
        self._hub = hub
        self._handshakes = metrics.handshakes
        self._accepted = metrics.handshakes.labels(result="accepted")

    async def websocket(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/connect`. Raises StewardError instead of upgrading."""
        try:
            return await self._websocket(request)
        except StewardError as error:
            self._handshakes.labels(result=error.reason.value).inc()
            raise

    async def events(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/events`. Raises StewardError instead of streaming."""
        try:
            return await self._events(request)
        except StewardError as error:
            self._handshakes.labels(result=error.reason.value).inc()
            raise

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        key = _websocket_key(request)
        point, client_id = _query(request)
        merge = parse_merge(one(request, "merge"))
        subprotocols = parse_subprotocols(request.headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, ()))
        tickets = request.query.getall("ticket", ())
        identity = await identify(self._hub, request, subprotocols, tickets)
        head = [
            "HTTP/1.1 101 Switching Protocols",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Accept: {accept_value(key)}",
        ]
        if SUBPROTOCOL in subprotocols:
            head.append(f"Sec-WebSocket-Protocol: {SUBPROTOCOL}")
        answer = ("\r\n".join(head) + "\r\n\r\n").encode()
        return self._hand_over(
            request, identity, point, client_id, answer, websocket=True, merge=merge
        )

    async def _events(self, request: web.Request) -> web.StreamResponse:
        point, client_id = _query(request)
        if parse_merge(one(request, "merge")):
            raise StewardError(Reason.PROTOCOL_VIOLATION, "merge=1 is for WebSockets; leave it out")
        last = request.headers.get("Last-Event-ID", "")
        if last:
            point = parse_last_event_id(last)
        tickets = request.query.getall("ticket", ())
        identity = await identify(self._hub, request, tickets=tickets)
        return self._hand_over(request, identity, point, client_id, _SSE_HEAD, websocket=False)

    def _hand_over(
        self,
        request: web.Request,
        identity: Identity,
        point: ResumePoint,
        client_id: str,
        answer: bytes,
        *,
        websocket: bool,
        merge: bool = False,
    ) -> web.StreamResponse:
        """Check the limits, answer, and give the transport to the hub, all in one turn."""
        refusal = self._hub.refusal(identity.user, client_id)
        if refusal is not None:
            raise refusal
        transport = transport_of(request)
        if transport is None:
            return TakenOver()  # The client did not wait for the answer.
        transport.write(answer)
        received = detach(request, transport)
        self._hub.connect(
            transport,
            identity,
            point,
            client_id,
            websocket=websocket,
            merge=merge,
            received=received,
        )
        self._accepted.inc()
        return TakenOver()


async def identify(
    hub: Hub,
    request: web.Request,
    subprotocols: Sequence[str] = (),
    tickets: Sequence[str] = (),
) -> Identity:
    """Who this request is of, by its one credential. Raises StewardError."""
    authorizations = request.headers.getall(hdrs.AUTHORIZATION, ())
    credential = parse_credential(authorizations, subprotocols, tickets)
    if isinstance(credential, BearerToken):
        return await hub.auth.check_token(credential.token)
    origin = request.headers.get(hdrs.ORIGIN, "")
    try:
        return await hub.auth.redeem_ticket(credential.ticket, origin)
    except TicketReplayed as replayed:
        text = f"it came again at {request.path!r}"
        hub.report(ViolationKind.REPLAYED_TICKET, text, replayed.user)
        raise


def accept_value(key: str) -> str:
    """`Sec-WebSocket-Accept` for a key."""
    # RFC 6455 names SHA-1 here; it protects nothing.
    digest = hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


def _websocket_key(request: web.Request) -> str:
    """The key of a proper upgrade request. Raises StewardError(PROTOCOL_VIOLATION)."""
    headers = request.headers
    upgrade = headers.get(hdrs.UPGRADE, "").strip().lower() == "websocket"
    options = ",".join(headers.getall(hdrs.CONNECTION, ())).lower().split(",")
    if not upgrade or "upgrade" not in (option.strip() for option in options):
        raise StewardError(Reason.PROTOCOL_VIOLATION, "this is a WebSocket; ask for an upgrade")
    if request.version < (1, 1) or headers.get(hdrs.SEC_WEBSOCKET_VERSION, "") != "13":
        raise StewardError(Reason.PROTOCOL_VIOLATION, "WebSocket version 13 over HTTP/1.1 only")
    key = headers.get(hdrs.SEC_WEBSOCKET_KEY, "").strip()
    try:
        size = len(base64.b64decode(key, validate=True))
    except (binascii.Error, ValueError):
        size = 0
    if size != 16:
        raise StewardError(Reason.PROTOCOL_VIOLATION, "Sec-WebSocket-Key is not 16 bytes")
    return key


def one(request: web.Request, name: str) -> str | None:
    """A query field that may occur once. Raises StewardError(PROTOCOL_VIOLATION)."""
    values = request.query.getall(name, ())
    if len(values) > 1:
        raise StewardError(Reason.PROTOCOL_VIOLATION, f"{name} is given twice")
    return values[0] if values else None


def _query(request: web.Request) -> tuple[ResumePoint, str]:
    """Where to begin, and the client's id. Raises StewardError(PROTOCOL_VIOLATION)."""
    if request.body_exists:
        # Its bytes could not be told from frames once the transport has changed hands.
        raise StewardError(Reason.PROTOCOL_VIOLATION, "this request has no body")
    point = parse_resume(one(request, "after"), one(request, "stream"))
    client_id = one(request, "client")
    if client_id is not None and not is_id(client_id):
        raise StewardError(Reason.PROTOCOL_VIOLATION, "client is not an id")
    return point, client_id or ""
