"""`LogService` on the wire: the gRPC face of one engine.

Reads, and what operators ask. Appends come by framed connections (`framed`); `HoldLogStream`
says the same for tools and for nodes that know no other way. A stream of which too much has
no answer is not read any further, and HTTP/2 flow control tells the caller. An answer that it
did not get is lost here: a node sends the same operation again on its next stream, and the
engine recognises it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from agent_service.log.answers import Answered, responses
from agent_service.log.convert import (
    fences_to,
    open_runs_to,
    page_to,
    range_from,
    summary_to,
    threads_to,
    user_from,
)
from agent_service.log.intake import LOG_FAILED, Intake
from agent_service.log.port import LogEngine, LogFailed
from steward.errors import Reason, StewardError
from steward.model.violations import Violation
from steward.rpc.outbox import Outbox, OutboxClosed
from steward.rpc.roles import Role
from steward.rpc.status import abort
from steward.v1 import agent_service_pb2, log_service_pb2, log_service_pb2_grpc

_SERVICE = "/steward.v1.LogService/"
ALLOWED: Mapping[str, frozenset[Role]] = {
    _SERVICE + "HoldLogStream": frozenset({Role.AGENT}),
    _SERVICE + "ReadStream": frozenset({Role.AGENT}),
    _SERVICE + "ReadThreads": frozenset({Role.AGENT}),
    _SERVICE + "DescribeLog": frozenset({Role.AGENT, Role.OPERATOR}),
    _SERVICE + "ListOpenRuns": frozenset({Role.AGENT}),
    _SERVICE + "ReadFences": frozenset({Role.AGENT}),
}
"""Who may call what; the interceptor refuses everybody else."""


class LogServicer(log_service_pb2_grpc.LogServiceServicer):
    """The gRPC face of one engine, for nodes of `cluster`. `report` never blocks."""

    def __init__(self, log: LogEngine, cluster: str, report: Callable[[Violation], None]) -> None:
        self._log = log
        self._cluster = cluster
        self._report = report
        self._streams: set[_LogStream] = set()

    def end_streams(self) -> None:
        """End every stream after the answers that are there. Nodes come back by themselves."""
        for stream in self._streams:
            stream.end()

    async def HoldLogStream(  # type: ignore[override]  # the stubs know generators only
        self,
        request_iterator: AsyncIterator[log_service_pb2.HoldLogStreamRequest],
        context: Any,
    ) -> None:
        stream: _LogStream | None = None
        try:
            node_id = await self._greet(request_iterator)
            welcome = log_service_pb2.LogWelcome(log_id=self._log.log_id)
            await context.write(log_service_pb2.HoldLogStreamResponse(welcome=welcome))
            stream = _LogStream(self._log, node_id, self._report)
            self._streams.add(stream)
            await stream.hold(request_iterator, context)
        except StewardError as error:
            await abort(context, error)
        finally:
            if stream is not None:
                self._streams.discard(stream)

    async def _greet(self, requests: AsyncIterator[log_service_pb2.HoldLogStreamRequest]) -> str:
        """Take the hello; who says it."""
        async for request in requests:
            if request.WhichOneof("body") != "hello":
                break
            if request.hello.cluster != self._cluster:
                raise StewardError(
                    Reason.PERMISSION_DENIED, f"this is cluster {self._cluster!r}; check --cluster"
                )
            return request.hello.node_id
        raise StewardError(Reason.PROTOCOL_VIOLATION, "a log stream begins with a hello")

    async def ReadStream(
        self, request: agent_service_pb2.ReadEventsRequest, context: Any
    ) -> agent_service_pb2.ReadEventsResponse:
        try:
            page = await self._log.read(user_from(request.user), range_from(request))
        except StewardError as error:
            await abort(context, error)
        except LogFailed:
            await abort(context, LOG_FAILED)
        return page_to(page)

    async def ReadThreads(
        self, request: agent_service_pb2.ListThreadsRequest, context: Any
    ) -> agent_service_pb2.ListThreadsResponse:
        try:
            threads, following = await self._log.threads(
                user_from(request.user), request.limit or 50, request.page
            )
        except StewardError as error:
            await abort(context, error)
        except LogFailed:
            await abort(context, LOG_FAILED)
        return threads_to(threads, following)

    async def DescribeLog(
        self, request: log_service_pb2.DescribeLogRequest, context: Any
    ) -> log_service_pb2.DescribeLogResponse:
        try:
            summary = await self._log.describe()
        except StewardError as error:
            await abort(context, error)
        except LogFailed:
            await abort(context, LOG_FAILED)
        return summary_to(summary)

    async def ListOpenRuns(
        self, request: log_service_pb2.ListOpenRunsRequest, context: Any
    ) -> log_service_pb2.ListOpenRunsResponse:
        try:
            after = user_from(request.after) if request.HasField("after") else None
            page = await self._log.open_runs(after, request.limit or 500)
        except StewardError as error:
            await abort(context, error)
        except LogFailed:
            await abort(context, LOG_FAILED)
        return open_runs_to(page)

    async def ReadFences(
        self, request: log_service_pb2.ReadFencesRequest, context: Any
    ) -> log_service_pb2.ReadFencesResponse:
        try:
            if request.users:
                page = await self._log.fences_of([user_from(user) for user in request.users])
            else:
                after = user_from(request.after) if request.HasField("after") else None
                page = await self._log.fences(after, request.limit or 1000)
        except StewardError as error:
            await abort(context, error)
        except LogFailed:
            await abort(context, LOG_FAILED)
        return fences_to(page)


class _LogStream:
    """One stream: a reader into the engine, and a writer of answers."""

    def __init__(self, log: LogEngine, node_id: str, report: Callable[[Violation], None]) -> None:
        self._intake = Intake(log, node_id, report, self._answered, self._failed)
        # What was answered, and numbers of pings.
        self._answers: Outbox[Answered | int] = Outbox()
        self._room = asyncio.Event()
        self._error: StewardError | None = None

    def end(self) -> None:
        """Stop after the answers that are there. Safe to call twice."""
        self._answers.close()

    async def hold(
        self, requests: AsyncIterator[log_service_pb2.HoldLogStreamRequest], context: Any
    ) -> None:
        """Serve until the stream ends. Raises StewardError for a node that breaks the rules."""
        reading = asyncio.create_task(self._read(requests))
        try:
            while items := await self._answers.take(64):
                answered = [item for item in items if not isinstance(item, int)]
                for message in responses(answered) if answered else ():
                    await context.write(message)
                pings = [item for item in items if isinstance(item, int)]
                if pings:
                    pong = log_service_pb2.LogPong(number=max(pings))
                    await context.write(log_service_pb2.HoldLogStreamResponse(pong=pong))
                self._intake.sent(answered)
                self._room.set()
        finally:
            reading.cancel()
            await asyncio.wait({reading})
        if not reading.cancelled():
            reading.result()
        if self._error is not None:
            raise self._error

    async def _read(self, requests: AsyncIterator[log_service_pb2.HoldLogStreamRequest]) -> None:
        try:
            async for request in requests:
                match request.WhichOneof("body"):
                    case "batch":
                        while not self._intake.has_room(request.batch):
                            self._room.clear()
                            await self._room.wait()
                        self._intake.submit(request.batch)
                    case "ping":
                        self._answers.put(request.ping.number)
                    case _:
                        raise StewardError(
                            Reason.PROTOCOL_VIOLATION, "batches and pings follow the hello"
                        )
        except OutboxClosed:
            return  # This end is stopping.
        finally:
            self._answers.close()

    def _answered(self, answered: Answered) -> None:
        try:
            self._answers.put(answered)
        except OutboxClosed:
            return  # The caller is gone; a node asks again on its next stream.

    def _failed(self, error: StewardError) -> None:
        self._error = error
        self._answers.close()
