"""Replays: pages of the log for connections that catch up.

A page is tried for until there is something to send, the connection is gone, or it can't be
had any more: a log that is away delays a replay and ends nothing. One whose next events are not
kept any more ends its connection, which comes back and is told `reset`. At most
`READS_AT_ONCE` are read at a time.
"""

import asyncio
import random
from collections.abc import Sequence
from typing import Protocol

from edge.core.batch import EventBatch
from edge.core.session import EdgeSession
from edge.core.session_values import PageRead, ReadFailed, ReadPage
from edge.host.connection import Connection
from edge.uplink.port import EventPage, EventRange, Nodes
from steward.errors import Reason, StewardError
from steward.model.keys import StreamId, UserKey
from steward.model.placement import Placement

PAGE_EVENTS = 500
READS_AT_ONCE = 64
FIRST_WAIT_S = 0.02
MOST_WAIT_S = 1.0


class Reader(Protocol):
    """Whose events are read, and the node that has them warm, at the moment."""

    @property
    def user(self) -> UserKey: ...

    @property
    def placement(self) -> Placement | None: ...

    def trimmed(self, stream_id: StreamId, oldest: int) -> None:
        """The log keeps the events from `oldest` on: whoever comes begins there."""
        ...

    def replayed(self, connection: Connection, events: Sequence[bytes]) -> None:
        """This connection gets these stored events next."""
        ...


class Replays:
    """The reads that connections wait for: a task for each page under way."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._random = random.Random()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reads = asyncio.Semaphore(READS_AT_ONCE)

    def start(self, reader: Reader, connection: Connection, page: ReadPage) -> None:
        """Read this page; the connection gets `PageRead` or `ReadFailed`."""
        task = asyncio.create_task(self._read(reader, connection, page))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End what is under way. Safe to call twice."""
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _read(self, reader: Reader, connection: Connection, page: ReadPage) -> None:
        wanted = EventRange(page.after, page.until, PAGE_EVENTS)
        wait_s = FIRST_WAIT_S
        while connection.transport is not None and not connection.session.closing:
            try:
                async with self._reads:
                    read = await self._nodes.read_events(reader.user, wanted, reader.placement)
            except StewardError as error:
                if error.reason is Reason.POSITION_COMPACTED:
                    connection.handle(ReadFailed(Reason.MANAGER_UNAVAILABLE))
                    return
            else:
                if read.stream_id == connection.session.stream_id and read.oldest > page.after + 1:
                    # It was told that it would get them. Coming again, it is told that it can't.
                    reader.trimmed(read.stream_id, read.oldest)
                    connection.handle(ReadFailed(Reason.MANAGER_UNAVAILABLE))
                    return
                if read.events:
                    reader.replayed(connection, read.events)
                    connection.handle(_page(read, connection.session, page.after + 1))
                    return
            await asyncio.sleep(wait_s * self._random.uniform(0.5, 1.0))
            wait_s = min(wait_s * 2, MOST_WAIT_S)


def _page(read: EventPage, session: EdgeSession, first: int) -> PageRead | ReadFailed:
    """The page as a command: only what continues exactly is one."""
    expected = range(first, first + len(read.events))
    if read.stream_id != session.stream_id or read.sequences != list(expected):
        return ReadFailed()
    return PageRead(EventBatch(first, read.events))
