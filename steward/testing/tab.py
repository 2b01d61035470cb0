"""A raw client of an edge: one WebSocket that knows the protocol page and nothing of Steward.

A `Tab` keeps every frame text as it came, so that two of them can be compared byte by
byte, and the time at which it came. It repairs nothing: what the SDK would hide (a
repeat, a gap, a second `ready`) is there to be found.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp

from steward.client.checks import check_stream

SUBPROTOCOL = "steward.v1"
READY_S = 15.0


class TabClosed(Exception):
    """The socket ended while a frame was waited for. `code` is the close code, if there was one."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"the socket was closed with {code}")
        self.code = code


class Tab:
    """One WebSocket. `events` and `texts` hold the events in the order in which they came."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.ready: dict[str, Any] = {}
        self.frames: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self.at: list[float] = []
        """When each event came, on `time.monotonic`."""

    @property
    def sequence(self) -> int:
        """The last sequence that came; before any, what `ready` said."""
        return int(self.events[-1]["sequence"] if self.events else self.ready["sequence"])

    async def read(self, timeout_s: float) -> dict[str, Any]:
        """The next frame. Raises TabClosed at the end, TimeoutError when none came in time."""
        async with asyncio.timeout(timeout_s):
            message = await self.socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise TabClosed(self.socket.close_code)
        frame: dict[str, Any] = json.loads(message.data)
        self.frames.append(frame)
        if "event_id" in frame:
            self.events.append(frame)
            self.texts.append(message.data)
            self.at.append(time.monotonic())
        elif frame["type"] == "ready":
            self.ready = frame
        return frame

    async def until(self, kind: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
        """Read up to the next frame of a type, with these fields; raises as `read` does."""
        async with asyncio.timeout(timeout_s):
            while True:
                frame = await self.read(timeout_s)
                if frame["type"] == kind and fields.items() <= frame.items():
                    return frame

    async def until_sequence(self, sequence: int, timeout_s: float) -> None:
        """Read until the event of this sequence, or a later one, has come."""
        async with asyncio.timeout(timeout_s):
            while not self.events or self.events[-1]["sequence"] < sequence:
                await self.read(timeout_s)

    async def until_closed(self, timeout_s: float) -> int | None:
        """Read up to the end; the close code."""
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    await self.read(timeout_s)
                except TabClosed as closed:
                    return closed.code

    async def send(self, id: str, content: Any, **fields: Any) -> None:
        """Send a user_message; `accepted` comes as a frame."""
        await self.socket.send_json(
            {"type": "user_message", "id": id, "content": content, **fields}
        )

    async def ask(self, id: str, content: Any, timeout_s: float, **fields: Any) -> dict[str, Any]:
        """Send a user_message and read up to the agent_completed of its run, which is returned."""
        await self.send(id, content, **fields)
        accepted = await self.until("accepted", timeout_s, id=id)
        for event in self.events:
            if event["type"] == "agent_completed" and event.get("run_id") == accepted["run_id"]:
                return event
        return await self.until("agent_completed", timeout_s, run_id=accepted["run_id"])

    def findings(self) -> list[str]:
        """What is wrong with the whole stream of a user, read from its first event on."""
        found = [str(finding) for finding in check_stream(self.events)]
        numbers = [event["sequence"] for event in self.events]
        if numbers != list(range(1, len(numbers) + 1)):
            found.append(f"the sequences are not 1 to {len(numbers)}: {numbers}")
        epochs = [event["epoch"] for event in self.events]
        if epochs != sorted(epochs):
            found.append(f"the epochs go down: {epochs}")
        return found

    def drop(self) -> None:
        """Lose the connection without a goodbye, as a network does."""
        response = self.socket._response
        connection = response.connection
        if connection is not None and connection.transport is not None:
            connection.transport.abort()

    async def close(self) -> None:
        """Safe to call twice."""
        await self.socket.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def open_tab(
    session: aiohttp.ClientSession,
    url: str,
    token: str = "",
    *,
    wait: bool = True,
    headers: Mapping[str, str] | None = None,
    **query: Any,
) -> Tab:
    """Connect to the edge at `url` and, with `wait`, read up to `ready`.

    `query` are the fields of `GET /v1/connect` (after, stream, client, ticket). Raises
    aiohttp.WSServerHandshakeError when the edge refuses, with its HTTP status.
    """
    target = f"{url}/v1/connect" + (f"?{urlencode(query)}" if query else "")
    socket = await session.ws_connect(
        target,
        headers={**({"Authorization": f"Bearer {token}"} if token else {}), **(headers or {})},
        protocols=[SUBPROTOCOL],
    )
    tab = Tab(socket)
    if wait:
        await tab.until("ready", READY_S)
    return tab


async def resume_tab(session: aiohttp.ClientSession, url: str, token: str, tab: Tab) -> Tab:
    """Connect again where `tab` ended. The new tab goes on with what the old one had."""
    new = await open_tab(
        session, url, token, wait=False, after=tab.sequence, stream=tab.ready["stream_id"]
    )
    new.events, new.texts, new.at = tab.events, tab.texts, tab.at
    await new.until("ready", READY_S)
    return new


@asynccontextmanager
async def many_sockets() -> AsyncIterator[aiohttp.ClientSession]:
    """A client session without a limit on connections."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session
