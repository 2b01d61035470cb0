"""Who may be a node under which name (P1).

Guarantees: a name belongs to one incarnation at a time, and a process that was fenced never
becomes a node again. A newcomer takes a name over only from an incarnation that is fenced
first, on evidence; else it is refused, and the attempt recorded once.
"""

from registry_service.core.commands import OpenNodeSession, PeerId
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import Close, NodeFenced, NodeUp, NodeWelcome, Refused
from registry_service.core.evidence import Observation
from registry_service.core.fencing import Fencing
from registry_service.core.node import Node, NodeTable
from registry_service.core.pipeline import Answer, StorePipeline
from registry_service.core.refusals import Refusals
from registry_service.core.transactions import (
    Evidence,
    JoinNode,
    NodeJoined,
    NodeOccupied,
    NodeRecord,
    NonceSpent,
)
from registry_service.core.turn import Turn
from steward.errors import Reason
from steward.model.keys import GENERATION_SHIFT, NodeId, NodeIncarnation
from steward.model.violations import Violation, ViolationKind


class Joining:
    """Takes hellos, and welcomes or refuses. `welcomed` holds the nodes of this turn's welcomes."""

    def __init__(
        self,
        config: RegistryConfig,
        turn: Turn,
        store: StorePipeline,
        nodes: NodeTable,
        fencing: Fencing,
        observation: Observation,
        refusals: Refusals,
    ) -> None:
        self._config = config
        self._turn = turn
        self._store = store
        self._nodes = nodes
        self._fencing = fencing
        self._observation = observation
        self._refusals = refusals
        self._joining: dict[NodeId, OpenNodeSession] = {}
        self.welcomed: list[Node] = []
        fencing.listeners.append(self._fenced)

    def in_progress(self, node_id: NodeId) -> bool:
        return node_id in self._joining

    def open(self, hello: OpenNodeSession) -> None:
        claim = hello.claim
        node = self._nodes.named(claim.node_id)
        joining = self._joining.get(claim.node_id)
        self._nodes.sessions[hello.peer] = claim.node_id
        if joining is not None:
            if joining.claim.nonce == claim.nonce:
                self._turn.emit(Close(joining.peer))
                self._joining[claim.node_id] = hello
            else:
                self._refuse(hello.peer, "another process is joining under this name")
        elif node is None:
            self._join(hello)
        elif node.record.claim.nonce == claim.nonce:
            self._resume(node, hello)
        else:
            self._succeed(node, hello)

    def _join(self, hello: OpenNodeSession) -> None:
        self._joining[hello.claim.node_id] = hello
        self._store.submit(JoinNode(hello.claim), self._joined)

    def _joined(self, answer: Answer) -> None:
        assert isinstance(answer.operation, JoinNode)
        hello = self._joining.pop(answer.operation.claim.node_id)
        lease_until_ms = self._turn.now_ms + self._config.ttl_ms
        match answer.result:
            case NodeJoined(record) if self._is_past(record):
                cause = "the generation was raised"
                self._send_away(hello.peer, record.incarnation, cause)
            case NodeOccupied(record) if self._is_past(record):
                self._refuse(hello.peer, "the name was in use")
            case NodeJoined(record):
                node = Node(record, lease_until_ms)
                if hello.peer in self._nodes.sessions:
                    self._nodes.add(node)
                    self._welcome(node, hello.peer, resumed=False)
                else:
                    self._observation.adopt(node)
            case NodeOccupied(record):
                # Somebody else wrote it: take it as found at a start, and let this one come again.
                self._observation.adopt(Node(record, lease_until_ms))
                self._refuse(hello.peer, "the name is in use")
            case NonceSpent(incarnation, cause):
                evidence = f"pid {hello.claim.pid}, which was fenced: {cause}"
                self._refusals.record(
                    Violation(ViolationKind.FENCED_NODE_RETURNED, evidence, node=incarnation)
                )
                self._send_away(hello.peer, incarnation, cause)

    def _is_past(self, record: NodeRecord) -> bool:
        """Whether the generation was raised, and this node fenced, since the store answered."""
        return record.node_rev >> GENERATION_SHIFT < self._turn.generation

    def _send_away(self, peer: PeerId, incarnation: NodeIncarnation, cause: str) -> None:
        self._turn.send(peer, NodeFenced(incarnation, cause))
        self._end(peer, Reason.LEASE_EXPIRED, "this process was fenced: exit")

    def _resume(self, node: Node, hello: OpenNodeSession) -> None:
        if node.session is not None:
            self._nodes.sessions.pop(node.session, None)
            self._turn.emit(Close(node.session))
        if node.fencing:
            # The fence is on its way, and its push will end this session.
            node.session = hello.peer
        else:
            self._welcome(node, hello.peer, resumed=True)

    def _succeed(self, node: Node, hello: OpenNodeSession) -> None:
        """Another process wants the name of a node that is in the store."""
        if node.fencing and node.successor is None:
            node.successor = hello
            return
        silent_ms = self._turn.now_ms - node.last_beat_ms
        if node.fencing or (node.session is not None and silent_ms < self._config.stale_ms):
            self._refuse_successor(node, hello, "the name is in use by a node that lives")
        elif self._observation.in_grace:
            # The old process may live and not have come back yet: only B may say otherwise.
            self._observation.dial(node)
            self._refuse_successor(node, hello, "the name is in use until its lease ends")
        else:
            node.successor = hello
            detail = f"a process with another nonce (pid {hello.claim.pid}) takes the name"
            self._fencing.fence(node, "replaced", Evidence.MISSED_BEATS, detail)

    def _fenced(self, node: Node) -> None:
        if node.successor is not None:
            self._join(node.successor)

    def _refuse_successor(self, node: Node, hello: OpenNodeSession, why: str) -> None:
        if node.refused_nonce != hello.claim.nonce:
            # Once per process: it will come again, with backoff.
            node.refused_nonce = hello.claim.nonce
            evidence = f"pid {hello.claim.pid} at {hello.claim.address}"
            self._refusals.record(
                Violation(ViolationKind.NODE_ID_IN_USE, evidence, node=node.incarnation)
            )
        self._refuse(hello.peer, why)

    def _refuse(self, peer: PeerId, why: str) -> None:
        self._end(peer, Reason.NODE_ID_IN_USE, why)

    def _end(self, peer: PeerId, reason: Reason, why: str) -> None:
        self._nodes.sessions.pop(peer, None)
        self._turn.send(peer, Refused(reason, why))

    def _welcome(self, node: Node, peer: PeerId, *, resumed: bool) -> None:
        now = self._turn.now_ms
        node.session = peer
        node.last_beat_ms = now
        node.lease_until_ms = now + self._config.ttl_ms
        node.redial_at_ms = None
        node.reported_ms = None
        node.log_away_since_ms = None
        node.log_back_at_ms = now
        welcome = NodeWelcome(
            node.incarnation.node_rev,
            self._config.ttl_ms,
            self._config.beat_ms,
            self._config.registry_id,
            tuple(sorted(self._config.strict_tenants)),
        )
        self._turn.send(peer, welcome)
        self._turn.emit(NodeUp(node.incarnation, node.record.claim.address, resumed))
        self._turn.more_room = True
        self.welcomed.append(node)
