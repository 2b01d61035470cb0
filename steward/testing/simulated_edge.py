"""An edge with one client per user in the simulation: it does what the protocol asks of edges."""

from dataclasses import dataclass, field

from agent_service.core.commands import AttachEdge, SubmitMessage
from agent_service.core.effects import (
    AnswerAccepted,
    AnswerAttached,
    AnswerRefused,
    Deliver,
)
from registry_service.core import commands as to_registry
from registry_service.core import effects as from_registry
from steward.model.keys import Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.testing.faults import EDGE
from steward.testing.invariants import InvariantBroken, Invariants
from steward.testing.simulated_log import SimulatedLog
from steward.testing.simulated_node import SimulatedNode
from steward.testing.simulated_registry import SimulatedRegistry
from steward.testing.world import Link, World


@dataclass(slots=True)
class _Attachment:
    """One user at the edge."""

    user: UserKey
    placement: Placement | None = None
    attached: bool = False
    resolving: bool = False
    min_epoch: int = 0
    max_epoch: int = 0
    position: int = 0
    pending: dict[str, SubmitMessage] = field(default_factory=dict)
    accepted: dict[str, str] = field(default_factory=dict)


class SimulatedEdge:
    """One edge with one client per user: resolve, attach, catch up, drop what is stale."""

    def __init__(
        self,
        world: World,
        registry: SimulatedRegistry,
        log: SimulatedLog,
        nodes: dict[str, SimulatedNode],
        invariants: Invariants,
    ) -> None:
        self._world = world
        self._registry = registry
        self._log = log
        self._nodes = nodes
        self._invariants = invariants
        self._links: dict[tuple[str, int], Link] = {}
        self.attachments: dict[UserKey, _Attachment] = {}
        self.dropped = 0
        for node in nodes.values():
            node.connect_edge(self._from_node)
            node.broke = self._broke
        registry.restarted.append(self._connect)
        self._connect()

    def send(self, user: UserKey, message: SubmitMessage) -> None:
        attachment = self.attachments.setdefault(user, _Attachment(user))
        attachment.pending[message.id] = message
        if attachment.attached:
            self._to_node(attachment, message)
        else:
            self._resolve(attachment)

    def poke(self) -> None:
        """Retry whatever is stuck: what the edge's backoff timers do."""
        for attachment in self.attachments.values():
            if not attachment.attached:
                attachment.resolving = False
                self._resolve(attachment)

    def _connect(self) -> None:
        self._peer = self._registry.connect(self._from_registry)
        self._registry.tell(to_registry.OpenEdgeSession(self._peer, EDGE))

    def _resolve(self, attachment: _Attachment) -> None:
        if not attachment.resolving:
            attachment.resolving = True
            query = to_registry.UserQuery(attachment.user, Epoch(attachment.min_epoch))
            self._registry.tell(to_registry.ResolveManagers(self._peer, 1, (query,)))

    def _from_registry(self, message: from_registry.Message) -> None:
        match message:
            case from_registry.ManagersResolved(_, results):
                for result in results:
                    if isinstance(result, Placement):
                        self._placed(result)
                    else:
                        self.attachments[result.user].resolving = False
            case from_registry.NodeFenced(incarnation):
                for attachment in self.attachments.values():
                    placed = attachment.placement
                    if placed is not None and placed.incarnation == incarnation:
                        self._lose(attachment)
            case _:
                pass

    def _placed(self, placement: Placement) -> None:
        attachment = self.attachments[placement.user]
        attachment.resolving = False
        if placement.epoch < attachment.min_epoch:
            return
        attachment.placement = placement
        attachment.attached = False
        self._to_node(attachment, AttachEdge(EDGE, 1, 1))

    def _to_node(self, attachment: _Attachment, command: AttachEdge | SubmitMessage) -> None:
        placement = attachment.placement
        assert placement is not None
        node = self._nodes[placement.node_id]
        if node.incarnation != placement.incarnation:
            report = to_registry.ReportUnreachable(self._peer, placement.incarnation, "refused")
            self._registry.tell(report)
            self._lose(attachment)
            return
        user, epoch = attachment.user, placement.epoch
        self._link("to", node).send(
            lambda: (
                node.later(lambda: node.command(user, epoch, command))
                if node.incarnation == placement.incarnation
                else None
            )
        )

    def _link(self, direction: str, node: SimulatedNode) -> Link:
        key = (f"{direction} {node.name}", node.life)
        if key not in self._links:
            self._links[key] = Link(self._world, 0, 10)
        return self._links[key]

    def _from_node(self, incarnation: NodeIncarnation, _: str, message: object) -> None:
        node = self._nodes[incarnation.node_id]
        self._link("from", node).send(lambda: self._receive(incarnation, message))

    def _receive(self, incarnation: NodeIncarnation, message: object) -> None:
        assert isinstance(message, tuple)
        user, answer = message
        attachment = self.attachments[user]
        match answer:
            case (epoch, AnswerAttached() as attached):
                self._attached(attachment, epoch, attached)
            case (epoch, Deliver() as deliver):
                self._delivered(attachment, epoch, deliver)
            case AnswerAccepted():
                attachment.pending.pop(answer.id, None)
                earlier = attachment.accepted.setdefault(answer.id, answer.run_id)
                if earlier != answer.run_id:
                    raise InvariantBroken(f"{answer.id} was accepted as two runs")
            case AnswerRefused() | int():
                placed = attachment.placement
                if placed is not None and placed.incarnation == incarnation:
                    self._lose(attachment)

    def _attached(self, attachment: _Attachment, epoch: Epoch, attached: AnswerAttached) -> None:
        placed = attachment.placement
        if placed is None or placed.epoch != epoch or epoch < attachment.max_epoch:
            return
        attachment.attached = True
        attachment.max_epoch = epoch
        missing = self._log.read(attachment.user, attachment.position, attached.sequence)
        self._show(attachment, epoch, attachment.position + 1, missing)
        for message in attachment.pending.values():
            self._to_node(attachment, message)

    def _delivered(self, attachment: _Attachment, epoch: Epoch, deliver: Deliver) -> None:
        if epoch < attachment.max_epoch or not attachment.attached:
            self.dropped += 1
            return
        skip = max(attachment.position + 1 - deliver.first, 0)
        if skip < len(deliver.payloads):
            self._show(attachment, epoch, deliver.first + skip, deliver.payloads[skip:])

    def _show(
        self, attachment: _Attachment, epoch: Epoch, first: int, payloads: tuple[bytes, ...]
    ) -> None:
        self._invariants.shown("client", attachment.user, epoch, first, payloads)
        attachment.position = max(attachment.position, first + len(payloads) - 1)

    def _broke(self, node: SimulatedNode, incarnation: NodeIncarnation | None) -> None:
        if incarnation is None:
            return
        self._registry.tell(to_registry.ReportUnreachable(self._peer, incarnation, "reset"))
        for attachment in self.attachments.values():
            placed = attachment.placement
            if placed is not None and placed.incarnation == incarnation:
                self._lose(attachment)

    def _lose(self, attachment: _Attachment) -> None:
        attachment.attached = False
        attachment.resolving = False
        self._world.after(20, lambda: self._resolve(attachment))
