"""How many connections are open, and at which edge: asked of the edges when an operator asks.

Nobody counts ahead of time. A count per user beside each attach would cost the way of every
connect a message, and be wrong whenever one is lost; an edge knows its own sockets exactly, so the
question goes there, on the session that it holds anyway, and only then.

Guarantees: answered within `ANSWER_S`; an edge that is silent, or too old to know the question,
is in the answer as one that did not answer. Not guaranteed: one moment for all edges (a client on
its way between two may be counted twice or not at all), nor edges without a session here.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from registry_service import convert
from registry_service.core.commands import PeerId
from registry_service.core.effects import AskConnections
from steward.errors import Reason, StewardError
from steward.model.keys import EdgeId
from steward.v1 import registry_service_pb2 as pb

ANSWER_S = 1.0
MOST_QUESTIONS = 64
"""Questions that may wait at a time; operators ask one now and then."""

Ask = Callable[[AskConnections], None]


@dataclass(slots=True)
class _Question:
    users: int
    # Edges that have not answered yet, by their session.
    waiting: set[PeerId]
    answers: dict[EdgeId, pb.EdgeConnections]
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Connections:
    """Asks and collects. One event loop, no locks; nothing of it is kept after the answer."""

    def __init__(self) -> None:
        # By name: of two sessions of one edge only the newer one is alive.
        self._edges: dict[EdgeId, tuple[PeerId, Ask]] = {}
        self._questions: dict[int, _Question] = {}
        self._last = 0

    def opened(self, edge_id: EdgeId, peer: PeerId, ask: Ask) -> None:
        """An edge has a session. `ask` must not wait or raise."""
        self._edges[edge_id] = (peer, ask)

    def closed(self, edge_id: EdgeId, peer: PeerId) -> None:
        """The session is over: who waits for its answer waits no longer. Safe to call twice."""
        known = self._edges.get(edge_id)
        if known is not None and known[0] == peer:
            del self._edges[edge_id]
        for question in self._questions.values():
            _settle(question, peer)

    def answered(self, edge_id: EdgeId, peer: PeerId, report: pb.ReportConnections) -> None:
        """What an edge said. A late answer is nothing special.

        Raises StewardError(PROTOCOL_VIOLATION) for one that is not about the users asked for.
        """
        question = self._questions.get(report.question)
        if question is None or peer not in question.waiting:
            return
        if len(report.of_users) != question.users:
            raise convert.violation("an answer counts each user of the question")
        answer = question.answers[edge_id]
        answer.answered, answer.open = True, report.open
        answer.of_users.extend(report.of_users)
        _settle(question, peer)

    async def count(self, request: pb.CountConnectionsRequest) -> pb.CountConnectionsResponse:
        """Ask every edge. Raises StewardError: PROTOCOL_VIOLATION, NO_CAPACITY."""
        users = convert.users_in(request.users)
        if len(users) > convert.MOST_USERS:
            raise convert.violation(f"at most {convert.MOST_USERS} users in one question")
        if len(self._questions) >= MOST_QUESTIONS:
            raise StewardError(Reason.NO_CAPACITY, "too many ask for connections; ask again")
        self._last += 1
        number = self._last
        asked = dict(self._edges)
        question = _Question(
            len(users),
            {peer for peer, _ in asked.values()},
            {edge_id: pb.EdgeConnections(edge_id=edge_id) for edge_id in sorted(asked)},
        )
        self._questions[number] = question
        try:
            for _, ask in asked.values():
                ask(AskConnections(number, users))
            async with asyncio.timeout(ANSWER_S):
                if question.waiting:
                    await question.done.wait()
        except TimeoutError:
            pass  # Those who did not answer are shown as such.
        finally:
            del self._questions[number]
        return pb.CountConnectionsResponse(edges=question.answers.values())


def _settle(question: _Question, peer: PeerId) -> None:
    question.waiting.discard(peer)
    if not question.waiting:
        question.done.set()
