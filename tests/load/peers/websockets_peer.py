"""`websockets` on uvloop."""

import uvloop
from orders import BACKLOG, TEXT, obey
from websockets.asyncio.server import ServerConnection, serve

clients: set[ServerConnection] = set()


async def handle(client: ServerConnection) -> None:
    clients.add(client)
    try:
        async for message in client:
            await client.send(message)
    finally:
        clients.discard(client)


async def push(burst: int) -> None:
    for client in list(clients):
        for _ in range(burst):
            await client.send(TEXT)


async def main() -> None:
    async with serve(handle, "127.0.0.1", 0, compression=None, backlog=BACKLOG) as server:
        await obey(server.sockets[0].getsockname()[1], push)


uvloop.run(main())
