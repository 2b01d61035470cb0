"""Questions of the census to nodes and edges, on the sessions that they hold anyway.

Guarantees: each question ends within its time; who is silent, or too old to know the question, is
left out of the answers, and the caller knows whom it asked. Not guaranteed: one moment for all.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from registry_service import convert
from registry_service.core.commands import PeerId
from registry_service.core.effects import AskFences, AskHoldings
from steward.model.census import BUCKETS, MOST_FENCES, MOST_LISTED
from steward.v1 import registry_service_pb2 as pb

Ask = Callable[[AskHoldings | AskFences], None]
Answer = pb.ReportHoldings | pb.ReportFences


@dataclass(frozen=True, slots=True)
class Session:
    """The session of a node or an edge. `ask` must not wait or raise."""

    name: str
    peer: PeerId
    ask: Ask


class Sessions:
    """Who can be asked. By name: of two sessions of one process only the newer one is alive."""

    def __init__(self) -> None:
        self._open: dict[str, Session] = {}

    def opened(self, name: str, peer: PeerId, ask: Ask) -> None:
        self._open[name] = Session(name, peer, ask)

    def closed(self, name: str, peer: PeerId) -> None:
        """Safe to call twice."""
        known = self._open.get(name)
        if known is not None and known.peer == peer:
            del self._open[name]

    def all(self) -> list[Session]:
        return list(self._open.values())

    def named(self, name: str) -> Session | None:
        return self._open.get(name)


class Questions:
    """Asks and collects. One event loop; nothing is kept after the answer."""

    def __init__(self) -> None:
        self._last = 0
        self._waiting: dict[int, tuple[PeerId, asyncio.Future[Answer]]] = {}

    def answered(self, peer: PeerId, answer: Answer) -> None:
        """An answer came. One that is late, or of somebody else, is dropped."""
        asked = self._waiting.get(answer.question)
        if asked is not None and asked[0] == peer and not asked[1].done():
            asked[1].set_result(answer)

    def gone(self, peer: PeerId) -> None:
        """The session is over: nobody waits for its answers any longer."""
        for asked, answer in self._waiting.values():
            if asked == peer:
                answer.cancel()

    async def ask_all(
        self, asked: Mapping[Session, tuple[int, ...]], within_s: float
    ) -> dict[Session, pb.ReportHoldings]:
        """Ask each for these buckets (none: for the digest); who answered, with what."""
        waiting = {
            session: self._ask(session, partial(AskHoldings, buckets=buckets))
            for session, buckets in asked.items()
        }
        answers = await self._collect(waiting, within_s)
        return {s: a for s, a in answers.items() if isinstance(a, pb.ReportHoldings)}

    async def ask_fences(
        self, session: Session, question: Callable[[int], AskFences], within_s: float
    ) -> pb.ReportFences | None:
        """Ask a node for fences; None when it did not answer."""
        answers = await self._collect({session: self._ask(session, question)}, within_s)
        answer = answers.get(session)
        return answer if isinstance(answer, pb.ReportFences) else None

    def _ask(
        self, session: Session, question: Callable[[int], AskHoldings | AskFences]
    ) -> tuple[int, "asyncio.Future[Answer]"]:
        self._last += 1
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[self._last] = (session.peer, answer)
        session.ask(question(self._last))
        return self._last, answer

    async def _collect(
        self, waiting: Mapping[Session, tuple[int, "asyncio.Future[Answer]"]], within_s: float
    ) -> dict[Session, Answer]:
        try:
            futures = [answer for _, answer in waiting.values()]
            if futures:
                await asyncio.wait(futures, timeout=within_s)
            return {
                session: answer.result()
                for session, (_, answer) in waiting.items()
                if answer.done() and not answer.cancelled()
            }
        finally:
            for number, answer in waiting.values():
                del self._waiting[number]
                answer.cancel()


def holdings_in(report: pb.ReportHoldings) -> pb.ReportHoldings:
    """The report, checked. Raises StewardError(PROTOCOL_VIOLATION) for what none sends."""
    if not len(report.buckets) == len(report.counts) == len(report.sums) <= BUCKETS:
        raise convert.violation("a digest has a count and a sum for each of its buckets")
    if len(report.holdings) > MOST_LISTED or any(bucket >= BUCKETS for bucket in report.buckets):
        raise convert.violation(f"at most {MOST_LISTED} holdings, in {BUCKETS} buckets")
    for holding in report.holdings:
        convert.user_in(holding.user)
        convert.epoch_in(holding.epoch)
        if holding.node_id:
            convert.incarnation_in(holding.node_id, holding.node_rev)
    return report


def fences_in(report: pb.ReportFences) -> pb.ReportFences:
    """As `holdings_in`."""
    if len(report.fences) > MOST_FENCES:
        raise convert.violation(f"at most {MOST_FENCES} fences in one report")
    for owned in report.fences:
        convert.user_in(owned.user)
        convert.epoch_in(owned.epoch)
    return report
