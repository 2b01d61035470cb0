"""A small stand-in for an edge that serves the page and plays scripted runs, to look at the page.

It speaks the wire protocol well enough for one user on one process: login, tickets, the socket
with resume, threads, history, cancel. Everything is in memory and every answer is written down
here; nothing about Steward itself can be concluded from it. `POST /control` breaks things on
purpose: `{"do": "drop"}` closes all sockets, `{"do": "move"}` moves the manager,
`{"do": "away", "seconds": 3}` refuses sockets for a while, `{"do": "close", "code": 4503}` closes
with a code.

    python tests/unit/web/scripted_edge.py --port 18099 --pace 0.2
"""

import argparse
import asyncio
import contextlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

STATIC = Path(__file__).parents[3] / "edge" / "static"
LOGIN_CODE = "look"
TOKEN = "scripted.token.value"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
ROWS = [
    {"region": "South", "units": 1840, "revenue": 412300.5},
    {"region": "West", "units": 1512, "revenue": 365120.0},
    {"region": "North", "units": 1498, "revenue": 351874.25},
    {"region": "East", "units": 1201, "revenue": 290410.75},
]
TABLE_ANSWER = """Here are the sales of each region, largest first.

| Region | Units | Revenue |
| --- | ---: | ---: |
| **South** | 1,840 | 412,300.50 |
| West | 1,512 | 365,120.00 |
| North | 1,498 | 351,874.25 |
| East | 1,201 | 290,410.75 |

Two things stand out:

- *South* leads by **12.9 %** over West.
- East sold the least, though its average price is the highest.

```sql
SELECT region, SUM(units) AS units, SUM(units * price) AS revenue
FROM sales GROUP BY region ORDER BY revenue DESC
```
"""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _unauthorized() -> web.Response:
    body = {"reason": "TOKEN_INVALID", "message": "not known here"}
    return web.json_response(body, status=401)


@dataclass
class ScriptedEdge:
    """One user's stream, its sockets and its runs."""

    pace: float
    stream_id: str = field(default_factory=lambda: f"s-{secrets.token_hex(6)}")
    epoch: int = 7
    node: str = "agent-1"
    events: list[dict[str, Any]] = field(default_factory=list)
    sockets: set[web.WebSocketResponse] = field(default_factory=set)
    live: set[web.WebSocketResponse] = field(default_factory=set)
    accepted: dict[str, dict[str, Any]] = field(default_factory=dict)
    tickets: set[str] = field(default_factory=set)
    runs: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    inputs: dict[str, asyncio.Future[Any]] = field(default_factory=dict)
    away_until: float = 0.0

    async def append(self, kind: str, data: dict[str, Any], **envelope: Any) -> dict[str, Any]:
        sequence = len(self.events) + 1
        event = {
            "type": kind,
            "stream_id": self.stream_id,
            "sequence": sequence,
            "epoch": self.epoch,
            "event_id": f"e{sequence}",
            "time": _now(),
            "trace": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00",
            **envelope,
            "data": data,
        }
        self.events.append(event)
        for socket in list(self.live):
            with contextlib.suppress(ConnectionError):
                await socket.send_json(event)
        return event

    # -- runs ----------------------------------------------------------------------------------

    async def play(self, run_id: str, thread_id: str, content: str) -> None:
        began = time.monotonic()
        envelope = {"thread_id": thread_id, "run_id": run_id, "agent": "demo"}

        async def say(kind: str, **data: Any) -> None:
            await self.append(kind, data, **envelope)
            await asyncio.sleep(self.pace)

        def lasted() -> int:
            return round((time.monotonic() - began) * 1000)

        await say("agent_started", input=content, attempt=1)
        text = ""
        open_call: dict[str, Any] | None = None
        try:
            async for kind, data in self.script(run_id, content):
                if kind == "tool_executing":
                    open_call = data
                if kind == "tool_completed":
                    open_call = None
                if kind == "agent_text":
                    text += data["delta"]
                await say(kind, **data)
        except asyncio.CancelledError:
            if open_call is not None:
                call = {key: open_call[key] for key in ("tool_call_id", "tool_name")}
                error = {"type": "Cancelled", "message": "the run was cancelled"}
                await self.append(
                    "tool_completed",
                    {**call, "success": False, "error": error, "duration_ms": 0},
                    **envelope,
                )
            done = {"outcome": "cancelled", "response": text, "duration_ms": lasted()}
            await self.append("agent_completed", done, **envelope)
            return
        except RuntimeError as failure:
            error = {"type": "RuntimeError", "message": str(failure)}
            done = {
                "outcome": "failed",
                "response": text,
                "error": error,
                "duration_ms": lasted(),
            }
            await self.append("agent_completed", done, **envelope)
            return
        done = {"outcome": "success", "response": text, "duration_ms": lasted()}
        await self.append("agent_completed", done, **envelope)

    async def script(self, run_id: str, content: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        question = content.lower()

        def call(tool: str, number: int, **arguments: Any) -> tuple[str, dict[str, Any]]:
            return "tool_executing", {
                "tool_call_id": f"{run_id}.{tool}.{number}",
                "tool_name": tool,
                "arguments": arguments,
            }

        def result(tool: str, number: int, value: Any, ms: int) -> tuple[str, dict[str, Any]]:
            return "tool_completed", {
                "tool_call_id": f"{run_id}.{tool}.{number}",
                "tool_name": tool,
                "success": True,
                "result": value,
                "duration_ms": ms,
            }

        def words(text: str) -> list[tuple[str, dict[str, Any]]]:
            parts = re.findall(r"\S+\s*|\s+", text)
            return [("agent_text", {"message_id": f"{run_id}.t1", "delta": part}) for part in parts]

        if "fail" in question:
            yield "agent_thinking", {"thought": "I was asked to fail.", "delta": False}
            raise RuntimeError("this is what a failure looks like")
        if "confirm" in question:
            yield "agent_thinking", {"thought": "This needs a person.", "delta": False}
            yield "progress", {"fraction": 0.4, "label": "Preparing"}
            yield "custom", {"name": "draft", "value": {"rows": 4}}
            schema = {"type": "boolean"}
            request = f"{run_id}.q1"
            asked = {"request_id": request, "prompt": "Send the report?", "schema": schema}
            self.inputs[request] = asyncio.get_running_loop().create_future()
            yield "input_requested", asked
            value = await self.inputs[request]
            yield "input_received", {"request_id": request, "value": value}
            for part in words("Sent." if value else "Not sent."):
                yield part
            return
        if "time" in question or "clock" in question:
            yield "agent_thinking", {"thought": "The clock knows.", "delta": False}
            yield call("clock", 1, zone="Asia/Tokyo")
            yield result("clock", 1, "2026-11-24T06:00:00+09:00", 1)
            for part in words("In Tokyo it is **06:00** on Tuesday, 24 November 2026."):
                yield part
            return
        if "%" in question or "calculate" in question:
            yield "agent_thinking", {"thought": "A plain calculation.", "delta": False}
            yield call("calculator", 1, expression="8640 * 12.5 / 100")
            yield result("calculator", 1, 1080.0, 0)
            for part in words("12.5 % of 8640 is `1080`."):
                yield part
            return
        yield "agent_thinking", {"thought": "I need the revenue of each region.", "delta": False}
        sums = "SUM(units) AS units, SUM(units * price) AS revenue"
        sql = f"SELECT region, {sums} FROM sales GROUP BY region"
        yield call("query_sales", 1, sql=sql)
        yield result("query_sales", 1, ROWS, 3)
        if "table" in question:
            answer = TABLE_ANSWER
        else:
            answer = (
                "**South** sold the most: revenue of 412,300.50 from 1,840 units, "
                "12.9 % more than West, which came second."
            )
        for part in words(answer):
            yield part

    async def submit(self, frame: dict[str, Any]) -> dict[str, Any]:
        known = self.accepted.get(frame["id"])
        if known is not None:
            return {**known, "duplicate": True}
        thread_id = frame.get("thread_id", "main")
        run_id = f"r-{secrets.token_hex(4)}"
        content = frame["content"]
        event = await self.append(
            "user_message",
            {"id": frame["id"], "content": content},
            thread_id=thread_id,
            run_id=run_id,
        )
        answer = {"id": frame["id"], "run_id": run_id, "sequence": event["sequence"]}
        self.accepted[frame["id"]] = {**answer, "duplicate": False}
        self.runs[run_id] = asyncio.create_task(self.play(run_id, thread_id, str(content)))
        return self.accepted[frame["id"]]

    # -- the socket ------------------------------------------------------------------------------

    async def connect(self, request: web.Request) -> web.StreamResponse:
        ticket = request.query.get("ticket", "")
        if time.monotonic() < self.away_until:
            return web.json_response({"reason": "NO_CAPACITY", "message": "away"}, status=503)
        if ticket not in self.tickets:
            return web.json_response(
                {"reason": "TOKEN_INVALID", "message": "no ticket"}, status=401
            )
        self.tickets.discard(ticket)
        socket = web.WebSocketResponse(protocols=("steward.v1",), timeout=0.1)
        await socket.prepare(request)
        self.sockets.add(socket)
        try:
            await self.attach(socket, request)
            async for message in socket:
                if message.type == WSMsgType.TEXT:
                    await self.on_frame(socket, json.loads(message.data))
        finally:
            self.sockets.discard(socket)
            self.live.discard(socket)
        return socket

    async def attach(self, socket: web.WebSocketResponse, request: web.Request) -> None:
        sequence = len(self.events)
        after, resume = sequence, "new"
        if "after" in request.query:
            after, resume = int(request.query["after"]), "resumed"
            if after > sequence or request.query.get("stream", self.stream_id) != self.stream_id:
                after, resume = 0, "reset"
        await socket.send_json(
            {
                "type": "ready",
                "connection_id": f"c-{secrets.token_hex(4)}",
                "tenant_id": "default",
                "user_id": "alice",
                "stream_id": self.stream_id,
                "sequence": sequence,
                "resume": resume,
                "manager": {"node_id": self.node, "epoch": self.epoch},
                "token_expires_at": (datetime.now(UTC) + timedelta(hours=8)).isoformat(),
                "limits": {
                    "max_message_bytes": 65536,
                    "messages_per_minute": 60,
                    "max_connections": 8,
                    "heartbeat_seconds": 15,
                },
            }
        )
        sent = after
        while sent < len(self.events):
            await socket.send_json(self.events[sent])
            sent += 1
        self.live.add(socket)

    async def on_frame(self, socket: web.WebSocketResponse, frame: dict[str, Any]) -> None:
        if frame["type"] == "ping":
            await socket.send_json({"type": "pong", "t": frame["t"]})
        elif frame["type"] == "user_message":
            await socket.send_json({"type": "accepted", **await self.submit(frame)})
        elif frame["type"] == "user_input":
            self.inputs[frame["request_id"]].set_result(frame["value"])
        elif frame["type"] == "cancel":
            self.runs[frame["run_id"]].cancel()

    async def control(self, request: web.Request) -> web.Response:
        command = await request.json()
        what = command["do"]
        if what == "move":
            before, self.node = self.node, "agent-2" if self.node == "agent-1" else "agent-1"
            self.epoch += 2
            moved = {"from_node": before, "to_node": self.node, "cause": "drain", "gap_ms": 38}
            await self.append("manager_moved", moved)
            return web.json_response({})
        code = command.get("code", WSCloseCode.GOING_AWAY)
        if what == "away":
            self.away_until = time.monotonic() + command["seconds"]
        await asyncio.gather(*(socket.close(code=code) for socket in list(self.sockets)))
        return web.json_response({})

    # -- HTTP --------------------------------------------------------------------------------------

    async def login(self, request: web.Request) -> web.Response:
        if (await request.json()).get("code") != LOGIN_CODE:
            return _unauthorized()
        return web.json_response({"token": TOKEN, "token_expires_at": _now()})

    async def ticket(self, request: web.Request) -> web.Response:
        if not self.knows(request):
            return _unauthorized()
        if time.monotonic() < self.away_until:
            return web.json_response({"reason": "NO_CAPACITY", "message": "away"}, status=503)
        ticket = secrets.token_urlsafe(8)
        self.tickets.add(ticket)
        return web.json_response({"ticket": ticket, "expires_in": 30})

    async def threads(self, request: web.Request) -> web.Response:
        if not self.knows(request):
            return _unauthorized()
        threads: dict[str, dict[str, Any]] = {}
        for event in self.events:
            if "thread_id" not in event:
                continue
            thread = threads.setdefault(event["thread_id"], {"title": ""})
            thread.update(thread_id=event["thread_id"], sequence=event["sequence"])
            thread["updated_at"] = event["time"]
            if event["type"] == "user_message" and not thread["title"]:
                thread["title"] = str(event["data"]["content"])[:80]
        newest = sorted(threads.values(), key=lambda thread: -thread["sequence"])
        return web.json_response({"threads": newest})

    async def thread_events(self, request: web.Request) -> web.Response:
        if not self.knows(request):
            return _unauthorized()
        limit = int(request.query.get("limit", 100))
        wanted = request.match_info["thread_id"]
        events = [event for event in self.events if event.get("thread_id") == wanted]
        body: dict[str, Any] = {"stream_id": self.stream_id}
        if "after" in request.query:
            after = int(request.query["after"])
            later = [event for event in events if event["sequence"] > after]
            body["events"] = later[:limit]
            if len(later) > limit:
                body["next"] = later[limit - 1]["sequence"]
        else:
            body["events"] = events[-limit:]
        return web.json_response(body)

    def knows(self, request: web.Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {TOKEN}"


async def _index(_: web.Request) -> web.StreamResponse:
    return web.FileResponse(STATIC / "index.html")


async def _set_policy(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["content-security-policy"] = POLICY
    response.headers["cache-control"] = "no-store"


async def serve(port: int, pace: float) -> None:
    edge = ScriptedEdge(pace)
    app = web.Application()
    app.on_response_prepare.append(_set_policy)
    app.add_routes(
        [
            web.get("/", _index),
            web.static("/static", STATIC),
            web.post("/v1/login", edge.login),
            web.post("/v1/tickets", edge.ticket),
            web.get("/v1/connect", edge.connect),
            web.get("/v1/threads", edge.threads),
            web.get("/v1/threads/{thread_id}/events", edge.thread_events),
            web.post("/control", edge.control),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    bound = runner.addresses[0][1]
    print(f"http://127.0.0.1:{bound}/#login={LOGIN_CODE}", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        for run in edge.runs.values():
            run.cancel()
        await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve the page with scripted runs.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pace", type=float, default=0.05, help="seconds between events")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(options.port, options.pace))
