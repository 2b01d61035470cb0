"""One WebSocket of a client, from the dial to the close, as a task that reports what happens.

Knows aiohttp and nothing of sessions. Everything it learns goes to `report` as a command
for the session (`Received`, `Closed`, `Refused`), in order, exactly one of the last two at
the end, and nothing any more after `shut`. It never raises into its owner.
"""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlencode

import aiohttp
import orjson

from steward.client.commands import Closed, Received, Refused
from steward.client.core import CODE_DONE, CODE_RESUME
from steward.errors import StewardError

SUBPROTOCOL = "steward.v1"
DIAL_S = 10.0
CLOSE_S = 2.0
MOST_EVENT_BYTES = 16 * 1024 * 1024
MOST_ERROR_BYTES = 64 * 1024
MOST_WAITING = 1024
"""Frames that wait to be written; the peer does not read beyond that."""

ABNORMAL = 1006
Report = Callable[[Received | Closed | Refused, str], None]


class UpgradeRefused(Exception):
    """The server answered the upgrade with something else than 101."""

    def __init__(self, status: int, reason: str, message: str, retry_after_ms: int) -> None:
        super().__init__(f"HTTP {status} {reason}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after_ms = retry_after_ms


async def check_upgrade(response: aiohttp.ClientResponse) -> None:
    """Raise UpgradeRefused, with what the body says, for an answer that is no upgrade.

    Given to aiohttp's session as `raise_for_status`: its own error has no body.
    """
    if response.status == 101:
        return
    body: Any = None
    try:
        content = await response.content.read(MOST_ERROR_BYTES)
        body = orjson.loads(content)
    except (orjson.JSONDecodeError, aiohttp.ClientError):
        pass  # The status alone decides then.
    if not isinstance(body, dict):
        body = {}
    told = body.get("retry_after_ms")
    if not isinstance(told, int) or isinstance(told, bool):
        seconds = response.headers.get("Retry-After", "")
        told = int(seconds) * 1000 if seconds.isascii() and seconds.isdigit() else 0
    raise UpgradeRefused(
        response.status, str(body.get("reason", "")), str(body.get("message", "")), max(told, 0)
    )


class Connection:
    """Dials at once. `token` gets the bearer token; `room` is awaited between two reads."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        query: dict[str, str],
        token: Callable[[], Awaitable[str]],
        report: Report,
        room: Callable[[], Awaitable[None]],
        rng: random.Random,
    ) -> None:
        self._http = http
        self._url = f"{url}?{urlencode(query)}" if query else url
        self._token = token
        self._report_to = report
        self._room = room
        self._rng = rng
        self._out: deque[str] = deque()
        self._wake = asyncio.Event()
        self._shut_code: int | None = None
        self._over = False
        self._ws: aiohttp.ClientWebSocketResponse | None = None
        self.task = asyncio.create_task(self._run(), name="steward-connection")

    def write(self, text: str) -> None:
        """Send a text message after those before it. A peer that reads nothing is given up."""
        if len(self._out) < MOST_WAITING:
            self._out.append(text)
            self._wake.set()
        else:
            # Not from in here: the session is in the middle of its effects.
            asyncio.get_running_loop().call_soon(self._give_up)

    def shut(self, code: int) -> None:
        """Close after what was written. Nothing is reported any more. Safe to call twice."""
        if self._shut_code is not None:
            return
        self._shut_code = code
        if self._ws is None:
            self.task.cancel()
        self._wake.set()

    def _give_up(self) -> None:
        self._report(Closed(ABNORMAL, random=self._rng.random()))
        self.shut(CODE_RESUME)

    def _report(self, command: Received | Closed | Refused, raw: str = "") -> None:
        if self._shut_code is None and not self._over:
            self._over = not isinstance(command, Received)
            self._report_to(command, raw)

    async def _run(self) -> None:
        end: Refused | Closed | None = await self._dial()
        if self._ws is not None:
            writer = asyncio.create_task(self._write_all(self._ws), name="steward-writer")
            try:
                end = await self._read_all(self._ws)
            finally:
                writer.cancel()
                await asyncio.wait({writer})
                await self._close(self._ws, self._shut_code or CODE_DONE)
        if end is not None:
            self._report(end)

    async def _dial(self) -> Refused | None:
        draw = self._rng.random()
        try:
            token = await self._token()
        except StewardError as error:
            status = 0 if error.row.retry else 403  # Some refusals are final.
            return Refused(status, error.reason, error.message, error.retry_after_ms or 0, draw)
        except Exception as error:
            # The application's own code, with whatever its libraries raise.
            return Refused(0, message=f"no token: {error!r}", random=draw)
        try:
            async with asyncio.timeout(DIAL_S):
                self._ws = await self._http.ws_connect(
                    self._url,
                    headers={"Authorization": f"Bearer {token}"},
                    protocols=(SUBPROTOCOL,),
                    max_msg_size=MOST_EVENT_BYTES,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_S),
                )
        except UpgradeRefused as refused:
            return Refused(
                refused.status, refused.reason, refused.message, refused.retry_after_ms, draw
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return Refused(0, message=str(error) or type(error).__name__, random=draw)
        return None

    async def _read_all(self, ws: aiohttp.ClientWebSocketResponse) -> Closed:
        while True:
            message = await ws.receive()
            if message.type is aiohttp.WSMsgType.TEXT:
                self._report(self._parsed(message.data), message.data)
                await self._room()
            elif message.type is aiohttp.WSMsgType.BINARY:
                self._report(Received(None, self._rng.random()))
            elif message.type is aiohttp.WSMsgType.CLOSE:
                return Closed(int(message.data), message.extra or "", self._rng.random())
            else:
                return Closed(ws.close_code or ABNORMAL, random=self._rng.random())

    def _parsed(self, text: str) -> Received:
        try:
            frame = orjson.loads(text)
        except orjson.JSONDecodeError:
            frame = None
        return Received(frame, self._rng.random())

    async def _write_all(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                async with asyncio.timeout(DIAL_S):
                    while self._out:
                        await ws.send_str(self._out.popleft())
            except (aiohttp.ClientError, OSError, TimeoutError):
                self._give_up()
            if self._shut_code is not None:
                await self._close(ws, self._shut_code)
                # The reader of our events may hold up the reading of the socket.
                self.task.cancel()
                return

    @staticmethod
    async def _close(ws: aiohttp.ClientWebSocketResponse, code: int) -> None:
        try:
            async with asyncio.timeout(2 * CLOSE_S):
                await ws.close(code=code)
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass  # It is gone, or aiohttp has dropped it now.
