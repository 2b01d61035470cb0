"""Framed connections of edges, at the node's end: hello, welcome, then commands and batches.

The same contract as `AgentService.HoldEdgeStream`, checked by the same role tokens, without a
thread or a task for each message (docs/decisions/0010). What is put for an edge in one turn of
the loop goes out at the end of that turn, in one message if it fits. An edge that breaks the
contract is told why in a last message. One that does not read is sent nothing more than
`MOST_UNREAD_BYTES`; the rest waits in its stream, whose own bound lets it go.
"""

import asyncio
from collections.abc import Iterator

from google.protobuf.message import DecodeError

from agent_service.batches import Batch
from agent_service.edge_streams import (
    HELLO_S,
    MOST_PER_BATCH,
    EdgeStream,
    EdgeStreams,
    no_hello,
)
from steward.errors import Reason, StewardError
from steward.rpc.factory import MAX_MESSAGE_BYTES
from steward.rpc.frame_guard import MOST_HELLO_BYTES, SILENT_S, FrameGuard
from steward.rpc.frames import FrameConnection
from steward.rpc.roles import Role, RoleVerifier
from steward.v1 import agent_service_pb2 as pb
from steward.v1 import registry_service_pb2

PREFACE = b"steward-edge/1\n"
"""The first bytes of a framed connection, by which a node tells it from HTTP/2."""
MOST_UNREAD_BYTES = 512 * 1024
MOST_PER_TURN = 8
"""Steps of sending to one edge before whatever else this process has to do has its turn."""


class FramedEdges:
    """All framed connections of a node."""

    def __init__(self, streams: EdgeStreams, verifier: RoleVerifier) -> None:
        self.streams = streams
        self.verifier = verifier
        self._edges: set[_FramedEdge] = set()
        self._none = asyncio.Event()
        self._none.set()

    def accept(self) -> FrameConnection:
        """The protocol of a connection that has begun with the preface."""
        edge = _FramedEdge(self)
        self._edges.add(edge)
        self._none.clear()
        return edge.connection

    def gone(self, edge: "_FramedEdge") -> None:
        self._edges.discard(edge)
        if not self._edges:
            self._none.set()

    async def close(self, within_s: float) -> None:
        """End what is open; what waits in streams that are ending may go out before."""
        try:
            async with asyncio.timeout(within_s):
                await self._none.wait()
        except TimeoutError:
            pass
        for edge in list(self._edges):
            edge.connection.abort("this node stops")


class _FramedEdge:
    """One connection, and the `FrameOwner` of it."""

    def __init__(self, edges: FramedEdges) -> None:
        self.connection = FrameConnection(self, MOST_HELLO_BYTES, most_unsent=MOST_UNREAD_BYTES)
        self._edges = edges
        self._stream: EdgeStream | None = None
        # Of what was taken from the box of the stream, what is not sent yet.
        self._batches: Iterator[Batch] = iter(())
        self._flushing = False
        self._refused = False
        self._loop = asyncio.get_running_loop()
        self._guard = FrameGuard(self.connection, HELLO_S, lambda: self._refuse(no_hello()))

    # What the connection calls.

    def received(self, frame: bytes) -> None:
        if self._refused:
            return
        self._guard.heard = True
        try:
            request = pb.HoldEdgeStreamRequest.FromString(frame)
            if self._stream is None:
                self._greet(request)
            else:
                self._edges.streams.take(self._stream, request)
        except DecodeError:
            self._refuse(StewardError(Reason.PROTOCOL_VIOLATION, "no message of an edge"))
        except StewardError as error:
            self._refuse(error)

    def drained(self) -> None:
        self._flush()

    def lost(self, why: str) -> None:
        self._guard.over()
        if self._stream is not None:
            self._stream.outbox.woken = None
            self._edges.streams.close(self._stream)
        self._edges.gone(self)

    # Messages of the edge.

    def _greet(self, request: pb.HoldEdgeStreamRequest) -> None:
        edges = self._edges
        if not request.HasField("hello"):
            raise no_hello()
        role = edges.verifier.role_of(request.hello.role_token)
        if role is not Role.EDGE:
            raise StewardError(Reason.PERMISSION_DENIED, f"role {role} may not hold a stream here")
        stream, welcome = edges.streams.open(request)
        self.connection.most_bytes = MAX_MESSAGE_BYTES
        self._stream = stream
        self._guard.welcomed(SILENT_S, "the edge is silent")
        self._send(pb.HoldEdgeStreamResponse(welcome=welcome))
        stream.outbox.woken = self._woken
        self._woken()

    # Answers and events.

    def _woken(self) -> None:
        stream = self._stream
        if stream is not None and (stream.aborted or stream.overflowed):
            # Whoever does not read would not see the end of what waits either.
            self.connection.abort("ended here")
        elif not self._flushing:
            # Behind whatever else is put in this turn.
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send what waits, unless the edge does not read: then when it does."""
        self._flushing = False
        stream, connection = self._stream, self.connection
        if stream is None or self._refused:
            return
        streams, outbox = self._edges.streams, stream.outbox
        for _ in range(MOST_PER_TURN):
            if connection.choked:
                return
            batch = next(self._batches, None)
            if batch is None:
                if not len(outbox):
                    if outbox.closed:
                        self._guard.end("the stream was ended")
                    return
                self._batches = stream.messages(outbox.take_now(MOST_PER_BATCH))
                continue
            if streams.is_mute(stream):
                connection.abort("this node is over")
                return
            message = pb.HoldEdgeStreamResponse(batch=batch.message)
            connection.send(message.SerializeToString(), batch.frames)
        self._woken()

    def _send(self, message: pb.HoldEdgeStreamResponse) -> None:
        self.connection.send(message.SerializeToString())

    # The end.

    def _refuse(self, error: StewardError) -> None:
        self._refused = True
        refused = registry_service_pb2.Refusal(reason=error.reason.value, message=error.message)
        self._send(pb.HoldEdgeStreamResponse(refused=refused))
        self._guard.end(error.message)
