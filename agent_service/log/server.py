"""`LogService` on the wire: seals and appends of many nodes into one engine, answers back.

One stream per node carries everything; what came in one message goes to the engine as
one piece, and what was answered meanwhile goes back as one message. A stream may have
`MOST_IN_FLIGHT` operations between being read and being answered; then it is not read
any further, and HTTP/2 flow control tells the node. An answer that the node did not get
is lost here: the node sends the same operation again on its next stream, and the engine
recognises it.

A write that the fence or the sequence refuses is reported by this side too, since whoever
tried it may be the last one to tell.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from agent_service.core.journal import Append, Conflict, Fenced
from agent_service.log.answers import Answered, responses
from agent_service.log.convert import (
    append_from,
    open_runs_to,
    page_to,
    range_from,
    seal_from,
    summary_to,
    threads_to,
    user_from,
)
from agent_service.log.port import LogFailed, LogFull
from agent_service.log.sqlite import SqliteLog
from agent_service.log.writer import Operation, Outcome
from steward.errors import Reason, StewardError
from steward.model.violations import Violation, ViolationKind
from steward.rpc.outbox import Outbox, OutboxClosed
from steward.rpc.roles import Role
from steward.rpc.status import abort
from steward.v1 import agent_service_pb2, log_service_pb2, log_service_pb2_grpc

MOST_IN_FLIGHT = 8192

_SERVICE = "/steward.v1.LogService/"
ALLOWED: Mapping[str, frozenset[Role]] = {
    _SERVICE + "HoldLogStream": frozenset({Role.AGENT}),
    _SERVICE + "ReadStream": frozenset({Role.AGENT}),
    _SERVICE + "ReadThreads": frozenset({Role.AGENT}),
    _SERVICE + "DescribeLog": frozenset({Role.AGENT, Role.OPERATOR}),
    _SERVICE + "ListOpenRuns": frozenset({Role.AGENT}),
}
"""Who may call what; the interceptor refuses everybody else."""

_REFUSED = (Fenced, Conflict)
_FAILED = StewardError(Reason.STORE_UNAVAILABLE, "the event log failed and is about to end")


class LogServicer(log_service_pb2_grpc.LogServiceServicer):
    """The gRPC face of one `SqliteLog`, for nodes of `cluster`. `report` never blocks."""

    def __init__(self, log: SqliteLog, cluster: str, report: Callable[[Violation], None]) -> None:
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
        stream = _LogStream(self._log, self._report)
        try:
            stream.node_id = await self._greet(request_iterator)
            welcome = log_service_pb2.LogWelcome(log_id=self._log.log_id)
            await context.write(log_service_pb2.HoldLogStreamResponse(welcome=welcome))
            self._streams.add(stream)
            await stream.hold(request_iterator, context)
        except StewardError as error:
            await abort(context, error)
        finally:
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
            await abort(context, _FAILED)
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
            await abort(context, _FAILED)
        return threads_to(threads, following)

    async def DescribeLog(
        self, request: log_service_pb2.DescribeLogRequest, context: Any
    ) -> log_service_pb2.DescribeLogResponse:
        try:
            summary = await self._log.describe()
        except StewardError as error:
            await abort(context, error)
        except LogFailed:
            await abort(context, _FAILED)
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
            await abort(context, _FAILED)
        return open_runs_to(page)


class _LogStream:
    """One node's stream: a reader into the engine, and a writer of answers."""

    def __init__(self, log: SqliteLog, report: Callable[[Violation], None]) -> None:
        self.node_id = ""
        self._log = log
        self._report = report
        # What was answered, and numbers of pings.
        self._answers: Outbox[Answered | int] = Outbox()
        self._in_flight = 0
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
                self._in_flight -= sum(len(a.outcomes) for a in answered)
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
                        await self._submit(request.batch)
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

    async def _submit(self, batch: log_service_pb2.LogBatch) -> None:
        operations: list[Operation] = [seal_from(message) for message in batch.seals]
        size = 0
        for message in batch.appends:
            append, its_size = append_from(message)
            operations.append(append)
            size += its_size
        if not operations:
            return
        while self._in_flight and self._in_flight + len(operations) > MOST_IN_FLIGHT:
            self._room.clear()
            await self._room.wait()
        seals = [message.request_id for message in batch.seals]
        appends = [message.request_id for message in batch.appends]
        try:
            self._log.submit(operations, size, partial(self._done, seals, appends, operations))
        except LogFull as error:
            raise StewardError(Reason.STORE_UNAVAILABLE, str(error)) from None
        self._in_flight += len(operations)

    def _done(
        self,
        seals: list[int],
        appends: list[int],
        operations: list[Operation],
        outcomes: Sequence[Outcome] | LogFailed,
    ) -> None:
        if isinstance(outcomes, LogFailed):
            self._error = _FAILED
            self._answers.close()
            return
        for operation, outcome in zip(operations, outcomes, strict=True):
            if isinstance(outcome, _REFUSED):
                self._report(_refused(operation, outcome, self.node_id))
        try:
            self._answers.put(Answered(seals, appends, outcomes))
        except OutboxClosed:
            return  # The node is gone; it asks again on its next stream.


def _refused(operation: Operation, outcome: Fenced | Conflict, node_id: str) -> Violation:
    if not isinstance(operation, Append):
        kind, what = ViolationKind.STALE_SEAL, f"seal by {operation.activation}"
    elif isinstance(outcome, Fenced):
        kind, what = ViolationKind.STALE_APPEND, f"append {operation.append_number}"
    else:
        kind, what = ViolationKind.APPEND_CONFLICT, f"append at {operation.expected_sequence}"
    met = (
        f"fence {outcome.fence}"
        if isinstance(outcome, Fenced)
        else f"a stream whose next is {outcome.next_sequence}"
    )
    evidence = f"{what} of {node_id!r} met {met}"
    return Violation(kind, evidence, operation.user, operation.epoch)
