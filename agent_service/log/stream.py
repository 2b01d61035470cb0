"""The one stream of a node to the log: seals and appends until they are answered.

`LogStream` connects again for as long as it lives, and on each new stream first sends, in
order and unchanged, every seal and append that has no answer yet; the log recognises
those it has already written. So a future ends with the log's outcome and with nothing
else, however often either side breaks. While the log is away futures are pending, which
is the back-pressure a manager sees.

A stream on which nothing came for a second, though pings were sent, is given up and opened
again on a new connection: a node that is cut off must know it long before TCP does. An engine
that is slow is another matter: the log answers pings whatever its disk does.

What waits is bounded twice: `MOST_WAITING` operations in all (one per manager, since a
user has one append in flight; beyond that `submit` raises LogFull), and of those at most
`WINDOW` or `WINDOW_BYTES` are on the stream at a time. Nothing waits for company here: who
submits many at once has them in one message, and the log commits what waits together.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

from agent_service.core.journal import Append, Record, Seal, Sealed
from agent_service.log.convert import (
    append_outcome_from,
    fill_append,
    fill_seal,
    seal_outcome_from,
)
from agent_service.log.framing import PREFACE
from agent_service.log.port import Done, LogFull, Operation, Outcome
from agent_service.log.rules import MOST_WAITING, carried
from steward.errors import StewardError
from steward.model.keys import NodeId
from steward.rpc.frame_link import FrameLink
from steward.rpc.roles import RoleCredentials
from steward.rpc.stream import keep
from steward.telemetry.logs import fields
from steward.v1 import log_service_pb2 as pb

WINDOW = 4096
WINDOW_BYTES = 16 * 1024 * 1024
MESSAGE_OPERATIONS = 512
MESSAGE_BYTES = 4 * 1024 * 1024

MOST_BACKOFF_S = 0.25
HELLO_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 2.0
PING_S = 0.2
MOST_QUIET_PINGS = 4
"""A stream that was silent for so many turns is dead: known within a second."""

_logger = logging.getLogger("steward.log.remote")

Link = FrameLink[pb.HoldLogStreamResponse]


class _Group:
    """Operations that were submitted together, and whom to tell when all have their outcomes."""

    __slots__ = ("done", "left", "outcomes")

    def __init__(self, number: int, done: Done) -> None:
        self.done = done
        self.left = number
        self.outcomes: list[Outcome | None] = [None] * number


class _Pending(NamedTuple):
    """An operation without an answer: number `place` of its group."""

    request_id: int
    operation: Operation
    size: int
    group: _Group
    place: int


class LogStream:
    """The stream to the log process at `address`. One event loop; `open` before all else."""

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
        # Records of seals whose answer is not complete; of the stream that is up.
        self._parts: dict[int, list[Record]] = {}
        self._sent = 0
        self._sent_bytes = 0
        # Where requests go while it is up, and the one that is opening.
        self._link: Link | None = None
        self._opening: Link | None = None
        # While answers are taken: what they lead to goes together, behind the last one.
        self._taking = False
        self._heard = False
        self._pings = 0
        self._drained = asyncio.Event()
        self._away: str | None = "no stream to the log yet"
        self._closed = False

    def open(self) -> None:
        """Start to connect; does not wait for it."""
        self._task = asyncio.create_task(
            keep(self._attempt, lambda: self._link is not None, self._on_down, MOST_BACKOFF_S)
        )

    @property
    def away(self) -> str | None:
        """Why no stream is up at this moment; None when one is."""
        return self._away

    def submit(self, operations: Sequence[Operation], done: Done) -> None:
        """Send operations that were checked before. Raises LogFull, and then none was sent."""
        if self._closed:
            raise RuntimeError("the event log is closed")
        if len(self._unanswered) + len(operations) > MOST_WAITING:
            raise LogFull(f"{len(self._unanswered)} operations wait")
        group = _Group(len(operations), done)
        request_id = self._next_id
        for place, operation in enumerate(operations):
            size = carried(operation) if isinstance(operation, Append) else 0
            pending = _Pending(request_id, operation, size, group, place)
            self._unanswered[request_id] = pending
            self._unsent.append(pending)
            request_id += 1
        self._next_id = request_id
        if not self._taking:
            self._send()

    async def close(self) -> None:
        """Wait up to 2 s for answers; what has none then is forgotten. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._unanswered and self._away is None:
            self._drained.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), CLOSE_TIMEOUT_S)
        self._task.cancel()
        await asyncio.wait({self._task})
        self._unanswered.clear()
        self._unsent.clear()

    async def _attempt(self) -> None:
        """One connection to its end."""
        link = self._opening = FrameLink(
            PREFACE, pb.HoldLogStreamResponse.FromString, self._on_welcome, self._on_message
        )
        hello = pb.LogHello(
            cluster=self._cluster, node_id=self._node_id, role_token=self._credentials.token()
        )
        first = pb.HoldLogStreamRequest(hello=hello).SerializeToString()
        watching = asyncio.create_task(self._watch(link.give_up))
        try:
            await link.hold(self._address, first, HELLO_TIMEOUT_S)
        finally:
            watching.cancel()
            await asyncio.wait({watching})

    async def _watch(self, give_up: Callable[[str], None]) -> None:
        """Ask for signs of life, and give the stream up when it showed none for too long.

        What is counted is turns of this loop, not time: after a standstill of this process its
        own lateness must not look like the log's silence.
        """
        quiet = 0
        while quiet < MOST_QUIET_PINGS:
            await asyncio.sleep(PING_S)
            if self._link is None:
                continue
            quiet = 0 if self._heard else quiet + 1
            self._heard = False
            self._pings += 1
            ping = pb.LogPing(number=self._pings)
            self._put(pb.HoldLogStreamRequest(ping=ping))
        give_up("the log is silent")

    def _on_welcome(self, _: pb.HoldLogStreamResponse) -> None:
        self._link = self._opening
        self._away = None
        self._heard = True
        # All that has no answer goes again, before all else and in its old order.
        self._unsent = deque(self._unanswered.values())
        self._sent = self._sent_bytes = 0
        self._parts.clear()
        self._send()

    def _on_message(self, response: pb.HoldLogStreamResponse) -> None:
        self._heard = True
        answers = response.answers
        self._taking = True
        try:
            for seal in answers.seals:
                self._sealed(seal)
            resolve = self._resolve
            for append in answers.appends:
                resolve(append.request_id, append_outcome_from(append))
        finally:
            self._taking = False
        if self._unsent:
            self._send()
        if not self._unanswered:
            self._drained.set()

    def _on_down(self, error: StewardError) -> None:
        if self._link is not None:
            where = fields(address=self._address, why=error.message)
            _logger.warning("the stream to the log is gone", extra=where)
        self._link = None
        self._away = f"no stream to the log at {self._address}: {error.message}"

    def _send(self) -> None:
        """What waits goes into the next messages, as far as the window is open."""
        while self._link is not None and (batch := self._next_batch()) is not None:
            self._put(batch)

    def _put(self, request: pb.HoldLogStreamRequest) -> None:
        """Never too much for the socket: the window bounds what waits."""
        if self._link is not None:
            # On a link that is just ending it is lost, and goes again on the next one.
            self._link.send(request.SerializeToString())

    def _next_batch(self) -> pb.HoldLogStreamRequest | None:
        request = pb.HoldLogStreamRequest()
        seals = request.batch.seals
        appends = request.batch.appends
        number = size = 0
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

    def _sealed(self, answer: pb.SealAnswer) -> None:
        """The answer to a seal, or a part of it: what a user has stored may be large."""
        outcome = seal_outcome_from(answer)
        if isinstance(outcome, Sealed):
            parts = self._parts.setdefault(answer.request_id, [])
            parts.extend(outcome.records)
            if answer.sealed.more:
                return
            del self._parts[answer.request_id]
            outcome = replace(outcome, records=tuple(parts))
        self._resolve(answer.request_id, outcome)

    def _resolve(self, request_id: int, outcome: Outcome) -> None:
        pending = self._unanswered.pop(request_id, None)
        if pending is None:
            return
        self._sent -= 1
        self._sent_bytes -= pending.size
        group = pending.group
        group.outcomes[pending.place] = outcome
        group.left -= 1
        if not group.left:
            try:
                group.done(cast("list[Outcome]", group.outcomes))
            except Exception:
                # The other answers of this message are as good as they were.
                _logger.exception("an answer of the log met an error of this process")
