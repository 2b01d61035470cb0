"""The edges that have a stream to this node, and the way of everything that is told to them.

An edge that is not there (any more) is told nothing: it attaches again on its next stream and
catches up from the log.
"""

from agent_service.core.commands import (
    AnnounceClient,
    AttachEdge,
    CancelRun,
    DetachEdge,
    SubmitInput,
    SubmitMessage,
)
from agent_service.core.effects import AnswerRefused, Deliver, TellClientTaken
from agent_service.core.manager import Manager
from agent_service.host.ports import EdgeAnswer, EdgePort
from steward.errors import Reason
from steward.model.keys import EdgeId, Epoch, UserKey

NO_EPOCH = Epoch(0)
EdgeCommand = AttachEdge | DetachEdge | SubmitMessage | CancelRun | SubmitInput | AnnounceClient


class EdgeStreams:
    """Edges by id. Nothing here blocks or raises."""

    def __init__(self) -> None:
        self._edges: dict[EdgeId, EdgePort] = {}

    def opened(self, edge: EdgePort) -> None:
        self._edges[edge.edge_id] = edge

    def closed(self, edge_id: EdgeId) -> None:
        self._edges.pop(edge_id, None)

    def abort(self) -> None:
        """End every stream now; from now on nobody is told anything."""
        for edge in self._edges.values():
            edge.abort()
        self._edges.clear()

    def deliver(self, live: Manager, effect: Deliver) -> None:
        for edge_id in effect.edges:
            edge = self._edges.get(edge_id)
            if edge is not None:
                edge.deliver(live.user, live.epoch, effect)

    def answer(self, live: Manager, answer: EdgeAnswer) -> None:
        edge = self._edges.get(answer.edge_id)
        if edge is not None:
            edge.answer(live.user, live.epoch, answer, NO_EPOCH)

    def client_taken(self, live: Manager, effect: TellClientTaken) -> None:
        for edge_id in effect.edges:
            edge = self._edges.get(edge_id)
            if edge is not None:
                edge.client_taken(live.user, live.epoch, effect.client_id)

    def manager_lost(self, live: Manager, reason: Reason, known: Epoch) -> None:
        """Tell the edges of a manager that it is over; `known` is the higher epoch, or 0."""
        for edge_id in live.edges:
            edge = self._edges.get(edge_id)
            if edge is not None:
                edge.manager_lost(live.user, live.epoch, reason, known)

    def refuse(
        self, user: UserKey, epoch: Epoch, command: EdgeCommand, reason: Reason, known: Epoch
    ) -> None:
        """Answer a command for which there is no manager."""
        edge = self._edges.get(command.edge_id)
        if edge is not None and not isinstance(command, DetachEdge | AnnounceClient):
            message = "no manager here under this epoch"
            answer = AnswerRefused(command.edge_id, command.command_id, reason, message)
            edge.answer(user, epoch, answer, known)
