"""Reading a range of etcd as a whole, and following it from there.

`list_range` reads all keys as they were at one revision. `follow` gives every later change once,
in order: over endpoints that come and go it resumes after the last change that it gave. It asks
for progress each second, and takes a stream that says nothing for three for dead. When what it
would resume from is compacted it says so, and the caller lists anew.

A progress answer is taken as a sign of life alone, never as "nothing happened up to here": servers
before 3.4.25 send it too early. Nor is the revision that comes with changes: it is that of the
server, which gives what a watch has to catch up with in parts. One that stays below what was
followed says that etcd was restored from a backup; then the caller lists anew too.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc

from registry_service.store.etcd_client import (
    RANGE,
    READ_ATTEMPT_S,
    WATCH,
    EtcdClient,
    EtcdCompacted,
    EtcdError,
    Member,
    refusal_of,
)
from registry_service.store.etcdpb import steward_etcd_pb2 as pb

PAGE = 2_000
PROGRESS_S = 1.0
DEAD_S = 3.0
_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Changes:
    """All that one or more transactions changed, up to the revision of the last of them."""

    revision: int
    events: Sequence[pb.Event]


async def list_range(
    client: EtcdClient,
    start: bytes,
    end: bytes,
    *,
    revision: int = 0,
    keys_only: bool = False,
    within_s: float,
) -> AsyncGenerator[pb.RangeResponse, None]:
    """Pages of the keys from `start` to before `end`, in order, all as of one revision.

    That of `revision`, or (0) of the first answer, which is linearizable. `within_s` is for each
    page. Raises EtcdCompacted, EtcdError, EtcdAway.
    """
    while True:
        request = pb.RangeRequest(
            key=start, range_end=end, limit=PAGE, revision=revision, keys_only=keys_only
        )
        page = await client.call(RANGE, request, within_s=within_s, attempt_s=READ_ATTEMPT_S)
        yield page
        if not page.more:
            return
        revision = revision or page.header.revision
        start = page.kvs[-1].key + b"\0"


async def follow(
    client: EtcdClient, start: bytes, end: bytes, after: int
) -> AsyncGenerator[Changes, None]:
    """Every change of keys from `start` to before `end` after a revision, without end.

    Raises EtcdCompacted when the changes after the last one given are no longer there, or never
    came to be in this etcd; EtcdError when etcd refuses.
    """
    while True:
        member = client.current
        stream = _Stream(member, start, end, after)
        try:
            async for changes in stream.changes():
                after = changes.revision
                yield changes
        except grpc.aio.AioRpcError as error:
            refusal = refusal_of(error)
            if refusal is not None:
                raise refusal from None
            member.forget_token()
        except (_Broken, TimeoutError, asyncio.InvalidStateError):
            # It was refused before the watch was written, ended, or says nothing any more.
            member.forget_token()
        finally:
            await stream.close()
        client.turn_from(member)
        await asyncio.sleep(_PAUSE_S)


class _Broken(Exception):
    """This stream gives no more; another may."""


class _Stream:
    """One watch on one member."""

    def __init__(self, member: Member, start: bytes, end: bytes, after: int) -> None:
        self._member = member
        self._range = (start, end)
        self._after = after
        self._call: Any = None
        self._asking: asyncio.Task[None] | None = None

    async def changes(self) -> AsyncGenerator[Changes, None]:
        start, end = self._range
        async with asyncio.timeout(DEAD_S):
            metadata = await self._member.metadata(DEAD_S)
            self._call = self._member.channel.stream_stream(
                WATCH,
                request_serializer=pb.WatchRequest.SerializeToString,
                response_deserializer=pb.WatchResponse.FromString,
            )(metadata=metadata)
            create = pb.WatchCreateRequest(
                key=start,
                range_end=end,
                start_revision=self._after + 1,
                progress_notify=True,
                fragment=True,
            )
            await self._call.write(pb.WatchRequest(create_request=create))
        self._asking = asyncio.create_task(self._ask_progress())
        now = asyncio.get_running_loop().time
        # A member may be behind the one that was followed before, but not for long.
        caught_up_by = now() + DEAD_S
        events: list[pb.Event] = []
        while True:
            answer = await self._read()
            if answer.header.revision < self._after and now() > caught_up_by:
                raise EtcdCompacted(f"etcd is at {answer.header.revision}, before what was seen")
            events.extend(answer.events)
            # A transaction may come in several messages: it is given as a whole.
            if events and not answer.fragment:
                yield Changes(events[-1].kv.mod_revision, events)
                events = []

    async def _read(self) -> pb.WatchResponse:
        async with asyncio.timeout(DEAD_S):
            answer = await self._call.read()
        if not isinstance(answer, pb.WatchResponse):
            raise _Broken
        if answer.compact_revision:
            raise EtcdCompacted(f"changes are kept from {answer.compact_revision} on")
        if answer.canceled:
            if "permission denied" in answer.cancel_reason:
                raise EtcdError(f"etcd refuses the watch: {answer.cancel_reason}")
            raise _Broken
        return answer

    async def _ask_progress(self) -> None:
        request = pb.WatchRequest(progress_request=pb.WatchProgressRequest())
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await asyncio.sleep(PROGRESS_S)
                await self._call.write(request)

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})
        if self._call is not None:
            self._call.cancel()
