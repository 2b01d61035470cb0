"""The event log in another process: the `EventLog` port over one gRPC stream and unary reads.

Seals and appends go by `LogStream`, which sends them again, unchanged, until the log has
answered; reads are tried again for some seconds and then refused.
"""

import asyncio
import random
from asyncio import Future
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import grpc

from agent_service.core.journal import Append, AppendOutcome, Seal, SealOutcome
from agent_service.log.convert import (
    fences_from,
    open_runs_from,
    page_from,
    range_to,
    summary_from,
    threads_from,
    user_to,
)
from agent_service.log.port import (
    Done,
    EventPage,
    FencePage,
    LogSummary,
    OpenRunPage,
    Operation,
    ReadRange,
    ThreadSummary,
)
from agent_service.log.rules import check_fences_of
from agent_service.log.stream import MOST_BACKOFF_S, LogStream
from agent_service.log.submitting import OneByOne
from steward.errors import Reason, StewardError
from steward.model.keys import NodeId, UserKey
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.roles import RoleCredentials
from steward.rpc.status import error_of
from steward.rpc.stream import FIRST_BACKOFF_S
from steward.v1 import agent_service_pb2, log_service_pb2, log_service_pb2_grpc

READ_ATTEMPT_S = 2.0
READ_TOTAL_S = 8.0

_RETRIED = frozenset({Reason.MANAGER_UNAVAILABLE, Reason.STORE_UNAVAILABLE})

Response = TypeVar("Response")


class RemoteLog:
    """A node's view of the log process at `address`. One event loop; `open` before all else."""

    def __init__(
        self, address: str, cluster: str, node_id: NodeId, credentials: RoleCredentials
    ) -> None:
        self._address = address
        self._credentials = credentials
        self._stream = LogStream(address, cluster, node_id, credentials)
        self._one_by_one = OneByOne(self.submit)

    async def open(self) -> None:
        """Start to connect; does not wait for it. A log that is away is no error."""
        self._channel = make_channel(self._address)
        self._stub = log_service_pb2_grpc.LogServiceStub(self._channel)
        self._stream.open()

    @property
    def connected(self) -> bool:
        """Whether a stream to the log is up, and gave a sign of life within about a second."""
        return self._stream.away is None

    def unready(self) -> str | None:
        """Why nothing can be appended at this moment; None when connected."""
        return self._stream.away

    def submit(self, operations: Sequence[Operation], size: int, done: Done) -> None:
        """Start operations that were checked before. As in the port."""
        self._stream.submit(operations, done)

    def append(self, append: Append) -> "Future[AppendOutcome]":
        """Start a fenced append. As in the port."""
        return self._one_by_one.append(append)

    async def seal(self, seal: Seal) -> SealOutcome:
        """Raise the fence and read the start, atomically. As in the port."""
        return await self._one_by_one.seal(seal)

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

    async def open_runs(self, after: UserKey | None, limit: int) -> OpenRunPage:
        """A page of the users who have an open run. As in the port."""
        request = log_service_pb2.ListOpenRunsRequest(limit=max(limit, 1))
        if after is not None:
            request.after.CopyFrom(user_to(after))
        return open_runs_from(await self._call(self._stub.ListOpenRuns, request))

    async def fences_of(self, users: Sequence[UserKey]) -> FencePage:
        """The fences of these users. As in the port."""
        check_fences_of(users)
        if not users:
            return FencePage(())
        request = log_service_pb2.ReadFencesRequest(users=[user_to(user) for user in users])
        return fences_from(await self._call(self._stub.ReadFences, request))

    async def fences(self, after: UserKey | None, limit: int) -> FencePage:
        """A page of all fences. As in the port."""
        request = log_service_pb2.ReadFencesRequest(limit=max(limit, 1))
        if after is not None:
            request.after.CopyFrom(user_to(after))
        return fences_from(await self._call(self._stub.ReadFences, request))

    async def describe(self) -> LogSummary:
        """Totals. As in the port."""
        request = log_service_pb2.DescribeLogRequest()
        return summary_from(await self._call(self._stub.DescribeLog, request))

    async def close(self) -> None:
        """Wait up to 2 s for answers, then cancel what has none. Safe to call twice."""
        await self._stream.close()
        self._one_by_one.cancel()
        await self._channel.close()

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
