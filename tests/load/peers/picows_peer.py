"""picows on uvloop."""

import asyncio

import uvloop
from orders import BACKLOG, TEXT, obey
from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

clients: set[WSTransport] = set()
payload = TEXT.encode()


class Listener(WSListener):
    def on_ws_connected(self, transport: WSTransport) -> None:
        clients.add(transport)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        clients.discard(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.TEXT:
            transport.send(WSMsgType.TEXT, frame.get_payload_as_bytes())


def listener(request: WSUpgradeRequest) -> WSListener:
    return Listener()


async def push(burst: int) -> None:
    for client in clients:
        for _ in range(burst):
            client.send(WSMsgType.TEXT, payload)


async def main() -> None:
    server = await ws_create_server(listener, "127.0.0.1", 0, backlog=BACKLOG)
    serving = asyncio.create_task(server.serve_forever())
    await obey(server.sockets[0].getsockname()[1], push)
    serving.cancel()


uvloop.run(main())
