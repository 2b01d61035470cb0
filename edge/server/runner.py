"""aiohttp's runner, with answers of our own for requests that can't be read.

A request that breaks HTTP itself never reaches the application. aiohttp answers it in
plain text and logs it with a stack, both of which quote the bytes: for a header that is too
long, the begin of a token. Here it gets the JSON error of every other refusal, and a log
line without a byte of it.
"""

import asyncio
import logging
from typing import Any

from aiohttp import web

from edge.server.answers import error_answer, secure
from edge.server.door import Doorway, Visitor
from steward.errors import Reason, StewardError

_log = logging.getLogger(__name__)


class Runner(web.AppRunner):
    """As `web.AppRunner`, which names no other way to choose the class of its connections."""

    def __init__(self, app: web.Application, doorway: Doorway, **options: Any) -> None:
        super().__init__(app, **options)
        self._doorway = doorway

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        made = _Server(
            server.request_handler, request_factory=server.request_factory, **server._kwargs
        )
        made.doorway = self._doorway
        return made


class _Server(web.Server):
    """Connections come through the door; the others are its own."""

    doorway: Doorway

    def __call__(self) -> asyncio.Protocol:  # type: ignore[override]
        return Visitor(self.doorway, self._request)

    def _request(self) -> web.RequestHandler:
        return _Requests(self, loop=self._loop, **self._kwargs)


class _Requests(web.RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status >= 500 or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        _log.debug("a request could not be read")
        text = "the request is malformed, or a line of it is too long"
        answer = error_answer(StewardError(Reason.PROTOCOL_VIOLATION, text), status)
        secure(answer)
        answer.force_close()
        return answer
