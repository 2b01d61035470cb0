"""An ASGI application under uvicorn on uvloop, on a socket of its own."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
import uvloop
from orders import BACKLOG, obey


def run(app: Any, push: Callable[[int], Awaitable[None]]) -> None:
    """Serve `app`, and obey orders by `push`."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    config = uvicorn.Config(
        app, log_level="error", ws_per_message_deflate=False, backlog=BACKLOG, lifespan="off"
    )

    async def main() -> None:
        serving = asyncio.create_task(uvicorn.Server(config).serve([listener]))
        await obey(listener.getsockname()[1], push)
        serving.cancel()

    uvloop.run(main())
