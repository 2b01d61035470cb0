"""The node's gRPC server: reads of stored events, and edge streams for who asks for them so.

Edges come on framed connections (`agent_service.framed`); a stream here is the same
`EdgeStream` in another carrier, for tools, for tests and for edges of another version.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from agent_service import convert
from agent_service.edge_streams import (
    HELLO_S,
    MOST_PER_BATCH,
    EdgeStream,
    EdgeStreams,
    no_hello,
)
from agent_service.host.host import ManagerHost
from agent_service.log import convert as log_convert
from agent_service.log.port import EventLog
from steward.errors import Reason, StewardError
from steward.rpc.roles import Role
from steward.rpc.status import abort
from steward.v1 import agent_service_pb2 as pb
from steward.v1.agent_service_pb2_grpc import AgentServiceServicer

SERVICE = "/steward.v1.AgentService/"
ALLOWED: dict[str, frozenset[Role]] = {
    SERVICE + "HoldEdgeStream": frozenset({Role.EDGE}),
    SERVICE + "ReadEvents": frozenset({Role.EDGE, Role.OPERATOR}),
    SERVICE + "ListThreads": frozenset({Role.EDGE}),
}
READ_S = 10.0


class AgentServicer(AgentServiceServicer):
    """Wire in, wire out; decides nothing."""

    def __init__(self, host: ManagerHost, log: EventLog, streams: EdgeStreams) -> None:
        self._host = host
        self._log = log
        self._streams = streams

    async def HoldEdgeStream(
        self,
        request_iterator: AsyncIterator[pb.HoldEdgeStreamRequest],
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> AsyncIterator[pb.HoldEdgeStreamResponse]:
        requests = aiter(request_iterator)
        try:
            first = await asyncio.wait_for(anext(requests), HELLO_S)
            stream, welcome = self._streams.open(first)
        except (TimeoutError, StopAsyncIteration):
            await abort(context, no_hello())
        except StewardError as error:
            await abort(context, error)
        reading = asyncio.ensure_future(self._read(requests, stream))
        try:
            yield pb.HoldEdgeStreamResponse(welcome=welcome)
            while items := await stream.outbox.take(MOST_PER_BATCH):
                for batch in stream.messages(items):
                    if self._streams.is_mute(stream):
                        return
                    yield pb.HoldEdgeStreamResponse(batch=batch.whole())
        finally:
            self._streams.close(stream)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def ReadEvents(
        self, request: pb.ReadEventsRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.ReadEventsResponse:
        user = convert.user_from_proto(request.user)
        await self._refuse_if_over(context)
        try:
            wanted = log_convert.range_from(request)
            page = await asyncio.wait_for(self._log.read(user, wanted), READ_S)
        except TimeoutError:
            await abort(context, StewardError(Reason.STORE_UNAVAILABLE, "the log is silent"))
        except StewardError as error:
            await abort(context, error)
        self._host.trimmed(user, page.oldest_sequence)
        return log_convert.page_to(page)

    async def ListThreads(
        self, request: pb.ListThreadsRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.ListThreadsResponse:
        user = convert.user_from_proto(request.user)
        limit = min(request.limit or 100, 1000)
        await self._refuse_if_over(context)
        try:
            reading = self._log.threads(user, limit, request.page)
            threads, next_page = await asyncio.wait_for(reading, READ_S)
        except TimeoutError:
            await abort(context, StewardError(Reason.STORE_UNAVAILABLE, "the log is silent"))
        except StewardError as error:
            await abort(context, error)
        return log_convert.threads_to(threads, next_page)

    async def _refuse_if_over(self, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        try:
            self._streams.refuse_if_over()
        except StewardError as error:
            await abort(context, error)

    async def _read(
        self, requests: AsyncIterator[pb.HoldEdgeStreamRequest], stream: EdgeStream
    ) -> None:
        try:
            async for request in requests:
                self._streams.take(stream, request)
        except grpc.RpcError:
            pass  # The edge is gone; the write side ends the same way.
        finally:
            stream.outbox.close()
