"""The event log in another process: the `EventLog` port over one gRPC stream and unary reads.

`RemoteLog` connects again for as long as it lives, and on each new stream first sends, in
order and unchanged, every seal and append that has no answer yet; the log recognises
those it has already written. So a future ends with the log's outcome and with nothing
else, however often either side breaks. While the log is away futures are pending, which
is the back-pressure a manager sees.

What waits is bounded twice: `MOST_WAITING` operations in all (one per manager, since a
user has one append in flight; beyond that `append` raises LogFull), and of those at most
`WINDOW` or `WINDOW_BYTES` are on the stream at a time.
"""

import asyncio
import contextlib
import logging
import random
from asyncio import Future
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc

from agent_service.core.journal import Append, AppendOutcome, Seal, SealOutcome
from agent_service.log.convert import (
    append_outcome_from,
    fill_append,
    fill_seal,
    page_from,
    range_to,
    seal_outcome_from,
    summary_from,
    threads_from,
    user_to,
)
from agent_service.log.port import (
    EventPage,
    LogFailed,
    LogFull,
    LogSummary,
    ReadRange,
    ThreadSummary,
)
from agent_service.log.rules import MOST_WAITING, check_append, check_seal
from agent_service.log.writer import Operation, Outcome
from steward.errors import Reason, StewardError
from steward.model.keys import NodeId, UserKey
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.roles import RoleCredentials
from steward.rpc.status import error_of
from steward.v1 import agent_service_pb2, log_service_pb2, log_service_pb2_grpc

WINDOW = 4096
WINDOW_BYTES = 16 * 1024 * 1024
MESSAGE_OPERATIONS = 512
WORTH_A_MESSAGE = 64
MESSAGE_BYTES = 4 * 1024 * 1024

FIRST_BACKOFF_S = 0.05
MOST_BACKOFF_S = 1.0
HELLO_TIMEOUT_S = 2.0
READ_ATTEMPT_S = 2.0
READ_TOTAL_S = 8.0
CLOSE_TIMEOUT_S = 2.0

_RETRIED = frozenset({Reason.MANAGER_UNAVAILABLE, Reason.STORE_UNAVAILABLE})

_logger = logging.getLogger("steward.log.remote")

Response = TypeVar("Response")


@dataclass(slots=True)
class _Pending:
    """An operation without an answer."""

    request_id: int
    operation: Operation
    size: int
    future: "Future[Outcome]"


class RemoteLog:
    """A node's view of the log process at `address`. One event loop; `open` before all else."""

    def __init__(
        self, address: str, cluster: str, node_id: NodeId, credentials: RoleCredentials
    ) -> None:
        self._address = address
        self._cluster = cluster
        self._node_id = node_id
        self._credentials = credentials
        self._next_id = 1
        # By request id, in order of arrival: also the order in which they are sent again.
        self._unanswered: dict[int, _Pending] = {}
        self._unsent: deque[_Pending] = deque()
        self._sent = 0
        self._sent_bytes = 0
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()
        self._away: str | None = "no stream to the log yet"
        self._closed = False

    async def open(self) -> None:
        """Start to connect; does not wait for it. A log that is away is no error."""
        self._channel = make_channel(self._address)
        self._stub = log_service_pb2_grpc.LogServiceStub(self._channel)
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._ended)

    @property
    def connected(self) -> bool:
        """Whether a stream to the log is up at this moment."""
        return self._away is None

    def unready(self) -> str | None:
        """Why nothing can be appended at this moment; None when connected."""
        return self._away

    def append(self, append: Append) -> "Future[AppendOutcome]":
        """Start a fenced append. As in the port."""
        return cast("Future[AppendOutcome]", self._start(append, check_append(append)))

    async def seal(self, seal: Seal) -> SealOutcome:
        """Raise the fence and read the start, atomically. As in the port."""
        check_seal(seal)
        return cast(SealOutcome, await self._start(seal, 0))

    def _start(self, operation: Operation, size: int) -> "Future[Outcome]":
        if self._closed:
            raise RuntimeError("the event log is closed")
        if len(self._unanswered) >= MOST_WAITING:
            raise LogFull(f"{len(self._unanswered)} operations wait")
        future: Future[Outcome] = asyncio.get_running_loop().create_future()
        pending = _Pending(self._next_id, operation, size, future)
        self._next_id += 1
        self._unanswered[pending.request_id] = pending
        self._unsent.append(pending)
        self._wake.set()
        return future

    async def read(self, user: UserKey, wanted: ReadRange) -> EventPage:
        """Stored events. As in the port."""
        request = range_to(user, wanted)
        return page_from(await self._call(self._stub.ReadStream, request))

    async def threads(
        self, user: UserKey, limit: int, page: str
    ) -> tuple[list[ThreadSummary], str]:
        """A page of threads, newest first. As in the port."""
        request = agent_service_pb2.ListThreadsRequest(
            user=user_to(user), limit=max(limit, 1), page=page
        )
        return threads_from(await self._call(self._stub.ReadThreads, request))

    async def describe(self) -> LogSummary:
        """Totals, for operators."""
        request = log_service_pb2.DescribeLogRequest()
        return summary_from(await self._call(self._stub.DescribeLog, request))

    async def close(self) -> None:
        """Wait up to 2 s for answers, then cancel what has none. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._unanswered and self.connected:
            self._drained.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), CLOSE_TIMEOUT_S)
        self._task.cancel()
        await asyncio.wait({self._task})
        for pending in self._unanswered.values():
            pending.future.cancel()
        self._unanswered.clear()
        self._unsent.clear()
        await self._channel.close()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """The connection loop never ends by itself; if it did, nobody may wait for ever."""
        if task.cancelled():
            return
        error = task.exception()
        _logger.critical("the stream to the log ended for good", exc_info=error)
        self._away = "the stream to the log ended for good"
        for pending in self._unanswered.values():
            if not pending.future.done():
                pending.future.set_exception(LogFailed(self._away))

    async def _run(self) -> None:
        """Hold one stream after the other, with a pause between those that did not come up."""
        backoff = FIRST_BACKOFF_S
        while True:
            try:
                await self._hold()
            except* (grpc.RpcError, StewardError, TimeoutError, asyncio.InvalidStateError) as group:
                why = _reason_of(group)
            else:
                why = "the log ended the stream"
            if self.connected:
                backoff = FIRST_BACKOFF_S
                _logger.warning("stream to the log at %s is gone: %s", self._address, why)
            self._away = f"no stream to the log at {self._address}: {why}"
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
            backoff = min(backoff * 2, MOST_BACKOFF_S)

    async def _hold(self) -> None:
        call = self._stub.HoldLogStream(metadata=call_metadata(self._credentials))
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = log_service_pb2.LogHello(cluster=self._cluster, node_id=self._node_id)
                await call.write(log_service_pb2.HoldLogStreamRequest(hello=hello))
                welcome = await call.read()
            if not isinstance(welcome, log_service_pb2.HoldLogStreamResponse):
                raise StewardError(Reason.STORE_UNAVAILABLE, "the log ended the stream")
            self._unsent = deque(self._unanswered.values())
            self._sent = self._sent_bytes = 0
            self._away = None
            async with asyncio.TaskGroup() as tasks:
                sending = tasks.create_task(self._send(call))
                await self._receive(call)
                sending.cancel()
        finally:
            call.cancel()

    async def _send(self, call: Any) -> None:
        """What waits goes into the next message, as far as the window is open."""
        while True:
            batch = self._next_batch()
            if batch is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                await call.write(batch)
            except asyncio.InvalidStateError:
                return  # The call is over; the receiving half knows why.

    def _next_batch(self) -> log_service_pb2.HoldLogStreamRequest | None:
        request = log_service_pb2.HoldLogStreamRequest()
        seals = request.batch.seals
        appends = request.batch.appends
        number = size = 0
        if self._sent and len(self._unsent) < WORTH_A_MESSAGE:
            return None
        while (
            self._unsent
            and self._sent < WINDOW
            and number < MESSAGE_OPERATIONS
            and (not self._sent or self._sent_bytes + self._unsent[0].size <= WINDOW_BYTES)
            and (not number or size + self._unsent[0].size <= MESSAGE_BYTES)
        ):
            pending = self._unsent.popleft()
            operation = pending.operation
            if type(operation) is Append:
                fill_append(appends.add(), pending.request_id, operation)
            else:
                fill_seal(seals.add(), pending.request_id, cast(Seal, operation))
            number += 1
            size += pending.size
            self._sent += 1
            self._sent_bytes += pending.size
        return request if number else None

    async def _receive(self, call: Any) -> None:
        while (response := await call.read()) is not grpc.aio.EOF:
            answers = response.answers
            for seal in answers.seals:
                self._resolve(seal.request_id, seal_outcome_from(seal))
            for append in answers.appends:
                self._resolve(append.request_id, append_outcome_from(append))
            if self._unsent:
                self._wake.set()
            if not self._unanswered:
                self._drained.set()

    def _resolve(self, request_id: int, outcome: Outcome) -> None:
        pending = self._unanswered.pop(request_id, None)
        if pending is None:
            return
        self._sent -= 1
        self._sent_bytes -= pending.size
        if not pending.future.done():
            pending.future.set_result(outcome)

    async def _call(self, method: Callable[..., Awaitable[Response]], request: object) -> Response:
        """A unary call with deadlines, tried again while the log is away, 8 s in all."""
        backoff = FIRST_BACKOFF_S
        loop = asyncio.get_running_loop()
        give_up = loop.time() + READ_TOTAL_S
        while True:
            try:
                return await method(
                    request,
                    timeout=min(READ_ATTEMPT_S, max(give_up - loop.time(), 0.001)),
                    metadata=call_metadata(self._credentials),
                )
            except grpc.RpcError as failure:
                error = error_of(failure)
            if error.reason not in _RETRIED:
                raise error
            pause = backoff * random.uniform(0.5, 1.0)
            if loop.time() + pause >= give_up:
                raise StewardError(
                    Reason.STORE_UNAVAILABLE, f"the event log can't be read: {error.message}"
                )
            await asyncio.sleep(pause)
            backoff = min(backoff * 2, MOST_BACKOFF_S)


def _reason_of(group: BaseExceptionGroup[Any]) -> str:
    """What ended a stream, for people."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            return _reason_of(error)
        if isinstance(error, grpc.RpcError):
            return error_of(error).message
        if isinstance(error, StewardError):
            return error.message
    return "no answer in time"
