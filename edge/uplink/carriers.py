"""How the messages of a link get to a node and back: framed, or as a gRPC stream.

A carrier holds one connection to its end. It takes what is to be sent from the link's box,
packs it, and hands on what comes. It knows nothing of what the messages are about. The
framed one is what edges use (docs/decisions/0010); the gRPC one is for a node that does
not know the other, as one of an older version in the middle of an upgrade.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from edge.convert import command_to_proto
from edge.core.commands import EdgeCommand
from edge.core.reach import SendProbe
from steward.rpc.frame_link import FrameLink
from steward.rpc.outbox import Outbox
from steward.rpc.stream import WELCOME_S, PeerStream
from steward.v1 import agent_service_pb2 as pb

PREFACE = b"steward-edge/1\n"
"""The first bytes of a framed connection of an edge."""
MOST_COMMANDS = 512
BUFFER_BYTES = 128 * 1024
"""Above what a node puts into one message, so that none but a large event needs more."""
MOST_PER_TURN_BYTES = 256 * 1024
"""So much of one node is worked on before sockets and other nodes have their turn."""

Item = EdgeCommand | SendProbe
OnWelcome = Callable[[pb.HoldEdgeStreamResponse], None]
OnBatch = Callable[[pb.NodeBatch, bytes | memoryview], None]
"""Takes a batch, and the frames of its deliveries: their bytes are good until it returns."""


class Box(Outbox[Item]):
    """Gives probes alone, in their place: a message carries commands or one probe."""

    def take_now(self, most: int) -> list[Item]:
        items = super().take_now(most)
        for index, item in enumerate(items):
            if isinstance(item, SendProbe):
                end = max(index, 1)
                self._items.extendleft(reversed(items[end:]))
                return items[:end]
        return items


async def hold_framed(
    address: str,
    hello: pb.EdgeStreamHello,
    role_token: str,
    box: Box,
    on_welcome: OnWelcome,
    on_batch: OnBatch,
) -> None:
    """Carry what is in the box until either side ends it. Raises StewardError; never returns.

    Raises `Unspoken` when the node may be one that does not know such connections; then the
    box has lost nothing.
    """
    framed = pb.EdgeStreamHello()
    framed.CopyFrom(hello)
    framed.role_token = role_token
    await _Framed(box, on_welcome, on_batch).hold(address, framed)


class _Framed:
    """One framed connection: its end of the box."""

    def __init__(self, box: Box, on_welcome: OnWelcome, on_batch: OnBatch) -> None:
        self._box = box
        self._on_welcome = on_welcome
        self._flushing = False
        self._loop = asyncio.get_running_loop()
        self._link = FrameLink(
            PREFACE,
            pb.HoldEdgeStreamResponse.FromString,
            self._welcomed,
            lambda message: on_batch(message.batch, message.batch.frames),
            on_drained=self._flush,
            on_tailed=lambda message, tail: on_batch(message.batch, tail),
            most_per_turn=MOST_PER_TURN_BYTES,
            buffer_bytes=BUFFER_BYTES,
        )

    async def hold(self, address: str, hello: pb.EdgeStreamHello) -> None:
        self._box.woken = self._woken
        try:
            first = pb.HoldEdgeStreamRequest(hello=hello).SerializeToString()
            await self._link.hold(address, first, WELCOME_S)
        finally:
            self._box.woken = None

    def _welcomed(self, message: pb.HoldEdgeStreamResponse) -> None:
        self._on_welcome(message)
        self._woken()

    def _woken(self) -> None:
        if self._box.closed:
            # By who holds the link: it has filled up, or nobody wants it any more.
            self._link.give_up("the node does not read")
        elif not self._flushing and self._link.welcomed:
            # Behind whatever else is put in this turn.
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send what waits, unless the node does not read: then when it does."""
        self._flushing = False
        while not self._link.choked and (items := self._box.take_now(MOST_COMMANDS)):
            self._link.send(pack(items).SerializeToString())


async def hold_grpc(
    stub: Any,
    metadata: tuple[tuple[str, str], ...],
    hello: pb.EdgeStreamHello,
    box: Box,
    on_welcome: OnWelcome,
    on_batch: OnBatch,
) -> None:
    """The same as a gRPC stream. Returns when the node ends it; raises StewardError."""
    stream: PeerStream[Item, pb.HoldEdgeStreamRequest, pb.HoldEdgeStreamResponse] = PeerStream(
        open_call=lambda: stub.HoldEdgeStream(metadata=metadata),
        hello=pb.HoldEdgeStreamRequest(hello=hello),
        pack=pack,
        most=MOST_COMMANDS,
        on_welcome=on_welcome,
        on_message=lambda message: on_batch(message.batch, message.batch.frames),
    )
    await stream.hold(box)


def pack(items: list[Item]) -> pb.HoldEdgeStreamRequest:
    """The message that carries these: commands, or one probe."""
    first = items[0]
    if isinstance(first, SendProbe):
        return pb.HoldEdgeStreamRequest(probe=pb.StreamProbe(number=first.number))
    commands = [command_to_proto(item) for item in items if isinstance(item, EdgeCommand)]
    return pb.HoldEdgeStreamRequest(commands=pb.CommandBatch(commands=commands))
