"""FastAPI under uvicorn."""

from asgi import run
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from orders import TEXT

app = FastAPI()
clients: set[WebSocket] = set()


@app.websocket("/")
async def handle(client: WebSocket) -> None:
    await client.accept()
    clients.add(client)
    try:
        while True:
            await client.send_text(await client.receive_text())
    except WebSocketDisconnect:
        pass
    finally:
        clients.discard(client)


async def push(burst: int) -> None:
    for client in list(clients):
        for _ in range(burst):
            await client.send_text(TEXT)


run(app, push)
