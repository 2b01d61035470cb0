"""Answers to the census of the registry, for nodes and edges alike.

A question asks for counts and sums of all buckets, or for everybody in some. The answer comes
from a walk over what is really held, in steps between which the loop serves others: a node with
100,000 managers is asked every few seconds. What is made or ended during a walk may be in the
answer or not; the registry asks twice before it believes.

Guarantees: questions are answered one after the other; a flood of them, or more entries than an
answer may carry, costs a bounded message: what is left out is said (`cut`), and what is not
answered the registry sees for itself.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Final

from steward.model.census import MOST_LISTED, SUM_MASK, Held
from steward.telemetry.logs import BUG, fields
from steward.v1 import placement_pb2
from steward.v1 import registry_service_pb2 as pb

_log = logging.getLogger(__name__)

STEP: Final = 250
"""Entries between two looks at the loop: a fraction of a millisecond."""

MOST_WAITING: Final = 16


class HoldingsAnswers:
    """Answers `AskHoldings`. `walk` gives what is held, `send` never blocks."""

    def __init__(
        self, walk: Callable[[], Iterator[Held]], send: Callable[[pb.ReportHoldings], None]
    ) -> None:
        self._walk = walk
        self._send = send
        self._asked: asyncio.Queue[pb.AskHoldings] = asyncio.Queue(MOST_WAITING)

    def asked(self, question: pb.AskHoldings) -> None:
        """A question came; never blocks. One too many is left without an answer."""
        if not self._asked.full():
            self._asked.put_nowait(question)

    async def run(self) -> None:
        """Answer until cancelled. A question that fails is left without an answer, which shows."""
        while True:
            question = await self._asked.get()
            try:
                await (self._list(question) if question.buckets else self._count(question))
            except Exception:
                _log.exception("a question of the census has no answer", extra=fields(do=BUG))

    async def _count(self, question: pb.AskHoldings) -> None:
        counts: dict[int, int] = {}
        sums: dict[int, int] = {}
        for number, held in enumerate(self._walk(), 1):
            if number % STEP == 0:
                await asyncio.sleep(0)
            if not held.making:
                bucket = held.bucket
                counts[bucket] = counts.get(bucket, 0) + 1
                sums[bucket] = (sums.get(bucket, 0) + held.weight) & SUM_MASK
        self._send(
            pb.ReportHoldings(
                question=question.question,
                buckets=counts.keys(),
                counts=counts.values(),
                sums=sums.values(),
            )
        )

    async def _list(self, question: pb.AskHoldings) -> None:
        wanted = frozenset(question.buckets)
        report = pb.ReportHoldings(question=question.question)
        for number, held in enumerate(self._walk(), 1):
            if number % STEP == 0:
                await asyncio.sleep(0)
            if held.bucket not in wanted:
                continue
            if len(report.holdings) >= MOST_LISTED:
                report.cut = True
                break
            node_id, node_rev = held.node or ("", 0)
            tenant, user = held.user
            report.holdings.add(
                user=placement_pb2.UserKey(tenant_id=tenant, user_id=user),
                epoch=held.epoch,
                node_id=node_id,
                node_rev=node_rev,
                making=held.making,
            )
        self._send(report)
