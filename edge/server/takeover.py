"""Taking a connection over from aiohttp after its handshake.

aiohttp reads and checks the HTTP request; then the transport changes hands: an own
asyncio protocol gets every byte from here on, and aiohttp's handler, parser and buffers
are freed. That leaves about a tenth of the memory per connection of aiohttp's own
WebSocket, and nothing between the socket and the frame codec.

Bytes that the client sent right behind its handshake were kept by aiohttp and come with
the transport. The one private thing used is the name of that buffer; a test sends
frames in the same segment as the handshake and fails when it moves.
"""

import asyncio
from typing import Any

from aiohttp import web


class TakenOver(web.StreamResponse):
    """What the handler returns to aiohttp: an answer that was given already."""

    async def prepare(self, request: web.BaseRequest) -> Any:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


def transport_of(request: web.Request) -> asyncio.Transport | None:
    """The open transport of a request; None when the client is gone."""
    transport = request.transport
    if transport is None or transport.is_closing():
        return None
    return transport


def detach(request: web.Request, transport: asyncio.Transport) -> bytes:
    """Make aiohttp let go of the transport. Returns the bytes that it had read too many.

    The caller sets the new protocol before it gives the loop a turn.
    """
    handler = request.protocol
    received = bytes(handler._message_tail)
    handler.transport = None
    handler.connection_lost(None)
    # aiohttp may have stopped reading because of those bytes; harmless if not.
    transport.resume_reading()
    return received
