"""The node's part in a census: what it holds, and the log's fences, read for the registry.

The registry has no way to the log of its own; any node has one. Guarantees: a question about
fences is answered within `ATTEMPT_S`, with the reason when the log could not be asked; holdings as
`steward.rpc.census` says. Everything goes out on the session that is open when the answer is ready.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from agent_service import convert
from steward.errors import StewardError
from steward.model.census import MOST_FENCES, Held
from steward.model.keys import Epoch, UserKey
from steward.rpc.census import HoldingsAnswers
from steward.v1 import registry_service_pb2 as pb

ATTEMPT_S = 2.0
MOST_WAITING = 16


class FencePage(Protocol):
    """As the log has it."""

    @property
    def fences(self) -> tuple[tuple[UserKey, Epoch], ...]: ...

    @property
    def more(self) -> bool: ...


class FenceReader(Protocol):
    """What is needed of the event log."""

    async def fences_of(self, users: Sequence[UserKey]) -> FencePage: ...

    async def fences(self, after: UserKey | None, limit: int) -> FencePage: ...


class NodeCensus:
    """Answers what the registry asks on the node's session. `run` as one task."""

    def __init__(
        self,
        log: FenceReader,
        walk: Callable[[], Iterator[Held]],
        node_rev: Callable[[], int],
        send: Callable[[pb.HoldNodeSessionRequest], object],
    ) -> None:
        self._log = log
        self._node_rev = node_rev
        self._send = send
        self._holdings = HoldingsAnswers(walk, self._report)
        self._fences: asyncio.Queue[pb.AskFences] = asyncio.Queue(MOST_WAITING)

    def asked(self, response: pb.HoldNodeSessionResponse) -> None:
        """A question came; never blocks."""
        if response.WhichOneof("body") == "ask_holdings":
            self._holdings.asked(response.ask_holdings)
        elif not self._fences.full():
            self._fences.put_nowait(response.ask_fences)

    async def run(self) -> None:
        """Answer until cancelled. Raises LogFailed when the log failed for good."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._holdings.run())
            tasks.create_task(self._read_fences())

    def _report(self, report: pb.ReportHoldings) -> None:
        report.node_rev = self._node_rev()
        self._send(pb.HoldNodeSessionRequest(holdings=report))

    async def _read_fences(self) -> None:
        while True:
            asked = await self._fences.get()
            report = pb.ReportFences(question=asked.question)
            try:
                async with asyncio.timeout(ATTEMPT_S):
                    await self._read(asked, report)
            except StewardError as error:
                report.failed = error.message
            except TimeoutError:
                report.failed = "the log did not answer in time"
            self._send(pb.HoldNodeSessionRequest(fences=report))

    async def _read(self, asked: pb.AskFences, report: pb.ReportFences) -> None:
        if asked.users:
            page = await self._log.fences_of([convert.user_from_proto(u) for u in asked.users])
        else:
            after = convert.user_from_proto(asked.after) if asked.HasField("after") else None
            page = await self._log.fences(after, asked.limit or MOST_FENCES)
        report.more = page.more
        for user, fence in page.fences:
            report.fences.add(user=convert.user_to_proto(user), epoch=fence)
