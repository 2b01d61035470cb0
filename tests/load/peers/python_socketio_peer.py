"""python-socketio under uvicorn: an event to one client at a time, as when each has its own."""

import socketio
from asgi import run
from orders import TEXT

server = socketio.AsyncServer(async_mode="asgi", transports=["websocket"])
clients: set[str] = set()


@server.event
async def connect(sid: str, environ: dict[str, object]) -> None:
    clients.add(sid)


@server.event
async def disconnect(sid: str) -> None:
    clients.discard(sid)


@server.event
async def m(sid: str, data: str) -> None:
    await server.emit("m", data, to=sid)


async def push(burst: int) -> None:
    for sid in list(clients):
        for _ in range(burst):
            await server.emit("m", TEXT, to=sid)


run(socketio.ASGIApp(server), push)
