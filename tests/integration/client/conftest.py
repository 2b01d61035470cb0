"""A small edge on a real WebSocket that keeps one user's stream, and breaks things on demand.

It speaks the protocol honestly (`ready`, resume, idempotent messages, one short run for each
message) except for what the next `Fault` says about the next connection.
"""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest_asyncio
from aiohttp import WSMsgType, web

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"


@dataclass
class Fault:
    """What goes wrong on one connection. Counts are of the events sent on it."""

    refuse: tuple[int, dict[str, Any], dict[str, str]] | None = None
    cut_after: int | None = None
    close_after: tuple[int, int] | None = None
    going_away_after: tuple[int, int] | None = None
    repeat: frozenset[int] = frozenset()
    skip: frozenset[int] = frozenset()
    swallow_accepted: bool = False
    before_ready: list[str] = field(default_factory=list)
    silent: bool = False


@dataclass
class Upgrade:
    query: dict[str, str]
    token: str
    at: float


class Connection:
    def __init__(self, ws: web.WebSocketResponse, fault: Fault) -> None:
        self.ws = ws
        self.fault = fault
        self.sent = 0
        self.broken = False

    async def frame(self, frame: dict[str, Any]) -> None:
        if not self.broken and not self.ws.closed:
            await self.ws.send_str(json.dumps(frame))

    async def event(self, event: dict[str, Any]) -> None:
        if self.broken or event["sequence"] in self.fault.skip:
            return
        for _ in range(2 if event["sequence"] in self.fault.repeat else 1):
            await self.frame(event)
        self.sent += 1
        if self.fault.going_away_after and self.sent == self.fault.going_away_after[0]:
            delay = self.fault.going_away_after[1]
            await self.frame({"type": "going_away", "reconnect_after_ms": delay})
        if self.sent == self.fault.cut_after:
            self.cut()
        if self.fault.close_after and self.sent == self.fault.close_after[0]:
            self.broken = True
            await self.ws.close(code=self.fault.close_after[1])

    def cut(self) -> None:
        """Break the connection as a pulled cable would."""
        self.broken = True
        assert self.ws._req is not None and self.ws._req.transport is not None
        self.ws._req.transport.abort()


class ScriptedEdge:
    def __init__(self) -> None:
        self.url = ""
        self.stream_id = "s1"
        self.epoch = 7
        self.events: list[dict[str, Any]] = []
        self.oldest = 1
        self.faults: deque[Fault] = deque()
        self.upgrades: list[Upgrade] = []
        self.tokens = {"good"}
        self.expires = timedelta(hours=1)
        self.heartbeat_seconds = 15.0
        self.connections: set[Connection] = set()
        self.messages: dict[str, tuple[str, int]] = {}
        self.received: list[dict[str, Any]] = []
        self.answer = ["South ", "sold ", "the most."]
        self.steps: list[tuple[str, dict[str, Any]]] = [
            ("agent_thinking", {"thought": "Working", "delta": False})
        ]
        self.outcome: dict[str, Any] = {"outcome": "success"}
        self.hold_runs = False
        self.arrived = asyncio.Condition()

    def append(self, type: str, data: dict[str, Any], run_id: str = "", **more: Any) -> None:
        sequence = len(self.events) + 1
        event = {
            "type": type,
            "stream_id": self.stream_id,
            "sequence": sequence,
            "epoch": self.epoch,
            "event_id": f"e{sequence}",
            "time": "2026-11-23T21:00:00.123Z",
            "trace": TRACE,
            "data": data,
        }
        if run_id:
            event |= {"thread_id": "main", "run_id": run_id, "agent": "demo"}
        self.events.append(event | more)

    async def publish(self, type: str, data: dict[str, Any], run_id: str = "") -> None:
        self.append(type, data, run_id)
        for connection in list(self.connections):
            await connection.event(self.events[-1])

    async def wait_for(self, type: str, number: int = 1) -> dict[str, Any]:
        """The n-th frame of a type that any client sent."""

        def found() -> list[dict[str, Any]]:
            return [frame for frame in self.received if frame["type"] == type]

        async with self.arrived, asyncio.timeout(5):
            await self.arrived.wait_for(lambda: len(found()) >= number)
            return found()[number - 1]

    async def wait_for_upgrades(self, number: int) -> None:
        """Until so many connections were asked for."""
        async with self.arrived, asyncio.timeout(5):
            await self.arrived.wait_for(lambda: len(self.upgrades) >= number)

    async def connect(self, request: web.Request) -> web.StreamResponse:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        loop = asyncio.get_running_loop()
        async with self.arrived:
            self.upgrades.append(Upgrade(dict(request.query), token, loop.time()))
            self.arrived.notify_all()
        fault = self.faults.popleft() if self.faults else Fault()
        if fault.refuse is not None:
            status, body, headers = fault.refuse
            return web.json_response(body, status=status, headers=headers)
        if self.tokens and token not in self.tokens:
            body = {"reason": "TOKEN_EXPIRED", "message": "the token expired"}
            return web.json_response(body, status=401)
        ws = web.WebSocketResponse(protocols=["steward.v1"])
        await ws.prepare(request)
        connection = Connection(ws, fault)
        try:
            await self.serve(connection, request.query)
        finally:
            self.connections.discard(connection)
        return ws

    async def serve(self, connection: Connection, query: Any) -> None:
        for text in connection.fault.before_ready:
            await connection.ws.send_str(text)
        if not connection.fault.silent:
            await self.attach(connection, query)
        async for message in connection.ws:
            if message.type is WSMsgType.TEXT:
                await self.on_frame(connection, json.loads(message.data))

    async def attach(self, connection: Connection, query: Any) -> None:
        head = len(self.events)
        resume, first = "new", head + 1
        if "after" in query:
            after = int(query["after"])
            fits = after <= head and query.get("stream", self.stream_id) == self.stream_id
            fits = fits and after + 1 >= self.oldest
            resume, first = ("resumed", after + 1) if fits else ("reset", self.oldest)
        expires = (datetime.now(UTC) + self.expires).isoformat(timespec="milliseconds")
        await connection.frame(
            {
                "type": "ready",
                "connection_id": f"c{len(self.upgrades)}",
                "tenant_id": "default",
                "user_id": "alice",
                "stream_id": self.stream_id,
                "sequence": head,
                "resume": resume,
                "manager": {"node_id": "agent-1", "epoch": self.epoch},
                "token_expires_at": expires.replace("+00:00", "Z"),
                "limits": {
                    "max_message_bytes": 65536,
                    "messages_per_minute": 600,
                    "max_connections": 8,
                    "heartbeat_seconds": self.heartbeat_seconds,
                },
            }
        )
        number = first
        while number <= len(self.events):
            await connection.event(self.events[number - 1])
            number += 1
        self.connections.add(connection)

    async def on_frame(self, connection: Connection, frame: dict[str, Any]) -> None:
        async with self.arrived:
            self.received.append(frame)
            self.arrived.notify_all()
        if frame["type"] == "cancel" and self.hold_runs:
            done = {"outcome": "cancelled", "response": "", "duration_ms": 3}
            await self.publish("agent_completed", done, frame["run_id"])
        elif frame["type"] == "user_message":
            await self.on_message(connection, frame)
        elif frame["type"] == "auth":
            self.expires = timedelta(hours=1)
            expires = (datetime.now(UTC) + self.expires).isoformat(timespec="milliseconds")
            await connection.frame(
                {"type": "authenticated", "token_expires_at": expires.replace("+00:00", "Z")}
            )

    async def on_message(self, connection: Connection, frame: dict[str, Any]) -> None:
        message_id = frame["id"]
        if frame["content"] == "refuse me":
            await connection.frame(
                {
                    "type": "error",
                    "reason": "RATE_LIMITED",
                    "message": "slower",
                    "ref": message_id,
                    "retry_after_ms": 700,
                }
            )
            return
        duplicate = message_id in self.messages
        if not duplicate:
            run_id = f"r{len(self.messages) + 1}"
            self.append("user_message", {"id": message_id, "content": frame["content"]}, run_id)
            self.messages[message_id] = (run_id, len(self.events))
        run_id, sequence = self.messages[message_id]
        if connection.fault.swallow_accepted:
            connection.cut()
        await connection.frame(
            {
                "type": "accepted",
                "id": message_id,
                "run_id": run_id,
                "sequence": sequence,
                "duplicate": duplicate,
            }
        )
        if duplicate:
            return
        for other in list(self.connections):
            await other.event(self.events[sequence - 1])
        await self.publish("agent_started", {"input": frame["content"], "attempt": 1}, run_id)
        for kind, data in self.steps:
            await self.publish(kind, data, run_id)
        if self.hold_runs:
            return
        for piece in self.answer:
            await self.publish("agent_text", {"message_id": "t1", "delta": piece}, run_id)
        done = {"response": "".join(self.answer), "duration_ms": 3}
        await self.publish("agent_completed", self.outcome | done, run_id)


@pytest_asyncio.fixture
async def edge() -> AsyncIterator[ScriptedEdge]:
    made = ScriptedEdge()
    app = web.Application()
    app.router.add_get("/v1/connect", made.connect)
    runner = web.AppRunner(app, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()
