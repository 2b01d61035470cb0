"""The front door: WebSocket handshakes without a task, everything else handed to aiohttp.

Each connection begins as a `Visitor`. When its first bytes are one whole `GET /v1/connect`, they
are read by aiohttp's parser, checked by the same code as behind its router, and answered by
callbacks: a handshake costs no task, no route and no request object. Anything else, also
what the parser refuses, a head in two pieces, or one with a body, goes on as a connection of
aiohttp's from its first byte.

Guaranteed: nothing is decided here that `edge.server.connect` does not decide; a visitor that
sends nothing is cut off after `IDLE_S`; no more than `MOST_EARLY_BYTES` of frames are taken
before the answer. A refusal closes the connection.
"""

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, cast

from aiohttp import HttpVersion, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser, RawRequestMessage
from multidict import CIMultiDictProxy, MultiDict, MultiMapping

from edge.server.answers import error_answer, secure
from edge.server.connect import Asked, Connect, Handshake, read_websocket
from steward.errors import Reason, StewardError
from steward.model.identity import Identity
from steward.telemetry.logs import BUG, fields

IDLE_S: Final = 30.0
SWEEP_S: Final = 1.0
READ_BYTES: Final = 1 << 16
MOST_EARLY_BYTES: Final = 1 << 16
_PATH: Final = b"GET /v1/connect"
_END_OF_HEAD: Final = b"\r\n\r\n"
_NO_QUERY: MultiMapping[str] = MultiDict()
_log = logging.getLogger(__name__)


class Doorway:
    """What the visitors of one edge share."""

    def __init__(self, connect: Connect, check: Callable[[Asked], None]) -> None:
        """`check` raises StewardError for a request that may not come in from where it is."""
        self.connect = connect
        self.check = check
        self._loop = asyncio.get_running_loop()
        # The parser tells it of bodies to be slowed down; there are none.
        self._nobody = BaseProtocol(self._loop)
        # Those that have sent nothing, and until when they may; in the order of their coming.
        self._silent: dict[Visitor, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def make_parser(self) -> HttpRequestParser:
        """A parser with the bounds of aiohttp's own."""
        return HttpRequestParser(self._nobody, self._loop, READ_BYTES)

    def came(self, visitor: "Visitor") -> None:
        self._silent[visitor] = self._loop.time() + IDLE_S
        if self._timer is None:
            self._timer = self._loop.call_later(SWEEP_S, self._sweep)

    def spoke(self, visitor: "Visitor") -> None:
        """It sent something, or is gone. Safe to call twice."""
        self._silent.pop(visitor, None)

    def close(self) -> None:
        """Cut off who has not said a word. Safe to call twice."""
        for visitor in list(self._silent):
            visitor.cut()
        if self._timer is not None:
            self._timer.cancel()

    def _sweep(self) -> None:
        self._timer = None
        now = self._loop.time()
        for visitor, until in list(self._silent.items()):
            if until > now:
                break
            visitor.cut()
        if self._silent:
            self._timer = self._loop.call_later(SWEEP_S, self._sweep)


class Visitor(asyncio.Protocol):
    """One connection until it is known what it wants."""

    __slots__ = ("_doorway", "_early", "_handshake", "_make_other", "_transport")

    def __init__(self, doorway: Doorway, make_other: Callable[[], asyncio.Protocol]) -> None:
        """`make_other` makes the protocol of a connection that is no handshake."""
        self._doorway = doorway
        self._make_other = make_other
        self._transport: asyncio.Transport | None = None
        self._handshake: Handshake | None = None
        self._early = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._doorway.came(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._doorway.spoke(self)

    def cut(self) -> None:
        """End without a word."""
        self._doorway.spoke(self)
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._handshake is not None:
            self._early += data
            if len(self._early) >= MOST_EARLY_BYTES:
                transport.pause_reading()
            return
        self._doorway.spoke(self)
        head = self._read(data)
        if head is None:
            self._hand_on(transport, data)
            return
        asked, self._early = head
        doorway = self._doorway
        try:
            doorway.check(asked)
            try:
                handshake = read_websocket(asked)
            except StewardError as error:
                doorway.connect.refused(None, error)
                raise
        except StewardError as error:
            self._refuse(error)
            return
        self._handshake = handshake
        doorway.connect.identify(handshake).add_done_callback(self._identified)

    def _read(self, data: bytes) -> "tuple[_Head, bytes] | None":
        """The head of a handshake and what follows it; None for anything else."""
        size = len(_PATH)
        if not data.startswith(_PATH) or data[size : size + 1] not in (b" ", b"?"):
            return None
        if _END_OF_HEAD not in data:
            return None
        try:
            messages, upgraded, rest = self._doorway.make_parser().feed_data(data)
        except HttpProcessingError:
            return None
        if not upgraded or len(messages) != 1:
            return None
        message, payload = messages[0]
        if not payload.is_eof():
            return None
        return _Head(message), rest

    def _hand_on(self, transport: asyncio.Transport, data: bytes) -> None:
        other = self._make_other()
        self._transport = None
        transport.set_protocol(other)
        other.connection_made(transport)
        other.data_received(data)

    def _identified(self, future: "asyncio.Future[Identity]") -> None:
        transport, handshake = self._transport, self._handshake
        error: BaseException | None = None
        if not future.cancelled():
            error = future.exception()
        if transport is None or handshake is None or transport.is_closing():
            return  # The client did not wait for the answer.
        connect = self._doorway.connect
        try:
            if error is not None:
                raise error
            identity = future.result()
            connect.check(handshake, identity)
            if len(self._early) >= MOST_EARLY_BYTES:
                transport.resume_reading()
            self._transport = None
            connect.take(handshake, identity, transport, self._early)
        except StewardError as refusal:
            connect.refused(handshake, refusal)
            self._refuse(refusal)
        except (Exception, asyncio.CancelledError):
            _log.exception("a handshake failed by an error of this process", extra=fields(do=BUG))
            self._refuse(StewardError(Reason.INTERNAL, "an error of this edge"))

    def _refuse(self, error: StewardError) -> None:
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(answer_bytes(error_answer(error)))
            transport.close()


class _Head:
    """`Asked`, of a message of the parser."""

    __slots__ = ("headers", "path", "query", "version")

    def __init__(self, message: RawRequestMessage) -> None:
        url = message.url
        self.headers: CIMultiDictProxy[str] = message.headers
        self.version: HttpVersion = message.version
        self.path: str = url.path
        self.query: MultiMapping[str] = url.query if url.raw_query_string else _NO_QUERY


def answer_bytes(answer: web.Response) -> bytes:
    """A refusal as it goes over the wire, the last one on its connection."""
    secure(answer)
    body = cast(bytes, answer.body)
    answer.headers["Content-Length"] = str(len(body))
    answer.headers["Connection"] = "close"
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    return "\r\n".join(lines).encode("latin-1") + _END_OF_HEAD + body
