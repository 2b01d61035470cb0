"""The life of nodes: joining, leases, broken streams, and the evidence that ends them.

Guarantees: a name belongs to one incarnation at a time (P1); a node is fenced only on
evidence of the classes A to D (P12, P13), and edges are told only after the fence is in
the store. In a grace (after a restart, or after this process was paused) only A and B
fence. It does not guarantee that a fenced process has stopped: the log does that.
"""

from collections.abc import Iterator

from registry_service.core.commands import (
    DialId,
    DialOutcome,
    OpenNodeSession,
    PeerId,
    ReceiveBeat,
    ReportDeath,
    ReportUnreachable,
    StreamEnd,
)
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import (
    Close,
    DeathRecorded,
    Dial,
    GraceBegun,
    LeaseRenewed,
    NodeDraining,
    NodeFenced,
    NodeLost,
    NodeUp,
    NodeWelcome,
    RefusalRecorded,
    Refused,
    RegistryBeat,
)
from registry_service.core.pipeline import Answer, StorePipeline
from registry_service.core.rendezvous import Candidate, choose
from registry_service.core.transactions import (
    DrainNode,
    Evidence,
    FenceNode,
    JoinNode,
    NodeJoined,
    NodeOccupied,
    NodeRecord,
    NonceSpent,
    RecordRefusal,
    StoreView,
)
from registry_service.core.turn import Turn
from steward.errors import Reason
from steward.model.keys import NodeId, NodeIncarnation, UserKey


class Node:
    """One living incarnation, as this process sees it. Mutated by `Nodes` alone."""

    __slots__ = (
        "deaths",
        "dial",
        "draining",
        "fencing",
        "incarnation",
        "last_beat_ms",
        "lease_until_ms",
        "managers",
        "placements",
        "placing",
        "record",
        "redial_at_ms",
        "redial_ms",
        "refused_nonce",
        "reported_ms",
        "session",
        "successor",
    )

    def __init__(self, record: NodeRecord, lease_until_ms: int, placements: int = 0) -> None:
        self.record = record
        self.incarnation = record.incarnation
        self.draining = record.draining
        self.lease_until_ms = lease_until_ms
        self.placements = placements
        self.placing = 0
        self.managers = 0
        self.session: PeerId | None = None
        self.last_beat_ms = 0
        self.fencing = False
        self.dial: DialId | None = None
        self.redial_at_ms: int | None = None
        self.redial_ms = 0
        self.reported_ms: int | None = None
        self.refused_nonce = ""
        # Who waits until this incarnation is fenced: the next process, and reports of its death.
        self.successor: OpenNodeSession | None = None
        self.deaths: list[PeerId] = []


class Nodes:
    """The nodes of the cluster, and every rule about them."""

    def __init__(self, config: RegistryConfig, turn: Turn, store: StorePipeline) -> None:
        self._config = config
        self._turn = turn
        self._store = store
        self._nodes: dict[NodeId, Node] = {}
        self._sessions: dict[PeerId, NodeId] = {}
        self._joining: dict[NodeId, OpenNodeSession] = {}
        self._dials: dict[DialId, Node] = {}
        self._last_dial = 0
        self._beat = 0
        self._beat_at_ms = 0
        self._grace_until_ms = 0

    # What others ask

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def get(self, incarnation: NodeIncarnation) -> Node | None:
        """The node, if exactly this incarnation is the living one."""
        node = self._nodes.get(incarnation.node_id)
        if node is None or node.incarnation.node_rev != incarnation.node_rev:
            return None
        return node

    def lives(self, node_id: NodeId, node_rev: int) -> bool:
        """Whether placements on this incarnation count."""
        node = self._nodes.get(node_id)
        return node is not None and node.incarnation.node_rev == node_rev and not node.fencing

    def of_session(self, peer: PeerId) -> Node | None:
        """The living node that holds this session."""
        node_id = self._sessions.get(peer)
        node = self._nodes.get(node_id) if node_id is not None else None
        if node is None or node.session != peer or node.fencing:
            return None
        return node

    def choose(self, user: UserKey) -> Node | None:
        """A node for a new user: up, not draining, below its bound. Fresh ones are preferred."""
        oldest = self._turn.now_ms - self._config.stale_ms
        up = [
            node
            for node in self._nodes.values()
            if node.session is not None and not node.draining and not node.fencing
        ]
        able = [node for node in up if node.last_beat_ms > oldest] or up
        chosen = choose(
            user,
            [
                Candidate(
                    node.incarnation.node_id,
                    node.placements + node.placing,
                    node.record.claim.capacity,
                )
                for node in able
            ],
        )
        return self._nodes[chosen] if chosen is not None else None

    # Start and grace

    def recover(self, view: StoreView) -> None:
        """Take the nodes of the store; dial them all: a dead one need not cost its lease."""
        counts = dict(view.placements)
        self._begin_grace("registry started")
        for record in view.nodes:
            node = Node(record, self._grace_until_ms, counts.get(record.incarnation, 0))
            self._nodes[record.claim.node_id] = node
            self._dial(node)

    def survive_pause(self) -> None:
        """This process was away: what it missed is no evidence against anybody."""
        self._begin_grace("registry was paused")
        for node in self._nodes.values():
            node.lease_until_ms = max(node.lease_until_ms, self._grace_until_ms)
            node.last_beat_ms = self._turn.now_ms

    def _begin_grace(self, cause: str) -> None:
        self._grace_until_ms = self._turn.now_ms + self._config.ttl_ms
        self._turn.emit(GraceBegun(cause, self._grace_until_ms))

    # Joining (P1)

    def open(self, hello: OpenNodeSession) -> None:
        claim = hello.claim
        node = self._nodes.get(claim.node_id)
        joining = self._joining.get(claim.node_id)
        self._sessions[hello.peer] = claim.node_id
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
        node_id = answer.operation.claim.node_id
        hello = self._joining.pop(node_id)
        present = hello.peer in self._sessions
        match answer.result:
            case NodeJoined(record):
                node = Node(record, self._turn.now_ms + self._config.ttl_ms)
                self._nodes[node_id] = node
                if present:
                    self._welcome(node, hello.peer, resumed=False)
                else:
                    self._dial(node)
            case NodeOccupied(record):
                # Somebody else wrote it: take it as found at a start, and let this one come again.
                node = Node(record, self._turn.now_ms + self._config.ttl_ms)
                self._nodes[node_id] = node
                self._dial(node)
                self._refuse(hello.peer, "the name is in use")
            case NonceSpent(incarnation, cause):
                self._record_refusal(
                    "fenced_node_returned", f"nonce of {cause}", incarnation=incarnation
                )
                self._turn.send(hello.peer, NodeFenced(incarnation, cause))
                self._end(hello.peer, Reason.LEASE_EXPIRED, "this process was fenced: exit")

    def _resume(self, node: Node, hello: OpenNodeSession) -> None:
        if node.session is not None:
            self._sessions.pop(node.session, None)
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
        detail = f"a process with another nonce (pid {hello.claim.pid}) takes the name"
        if node.fencing or (node.session is not None and silent_ms < self._config.stale_ms):
            self._refuse_successor(node, hello, "the name is in use by a node that lives")
        elif self._turn.now_ms < self._grace_until_ms:
            # The old process may live and not have come back yet: only B may say otherwise.
            self._dial(node)
            self._refuse_successor(node, hello, "the name is in use until its lease ends")
        else:
            node.successor = hello
            self._fence(node, "replaced", Evidence.MISSED_BEATS, detail)

    def _refuse_successor(self, node: Node, hello: OpenNodeSession, why: str) -> None:
        if node.refused_nonce != hello.claim.nonce:
            # Once per process: it will come again, with backoff.
            node.refused_nonce = hello.claim.nonce
            self._record_refusal(
                "node_id_in_use",
                f"pid {hello.claim.pid} at {hello.claim.address}",
                incarnation=node.incarnation,
            )
        self._refuse(hello.peer, why)

    def _refuse(self, peer: PeerId, why: str) -> None:
        self._end(peer, Reason.NODE_ID_IN_USE, why)

    def _end(self, peer: PeerId, reason: Reason, why: str) -> None:
        self._sessions.pop(peer, None)
        self._turn.send(peer, Refused(reason, why))

    def _welcome(self, node: Node, peer: PeerId, *, resumed: bool) -> None:
        now = self._turn.now_ms
        node.session = peer
        node.last_beat_ms = now
        node.lease_until_ms = now + self._config.ttl_ms
        node.redial_at_ms = None
        node.reported_ms = None
        self._turn.send(
            peer,
            NodeWelcome(
                node.incarnation.node_rev,
                self._config.ttl_ms,
                self._config.beat_ms,
                self._config.registry_id,
            ),
        )
        self._turn.emit(NodeUp(node.incarnation, node.record.claim.address, resumed))
        self._turn.more_room = True

    # Living

    def beat(self, beat: ReceiveBeat) -> None:
        node = self.of_session(beat.peer)
        if node is not None:
            node.last_beat_ms = self._turn.now_ms
            node.managers = beat.managers

    def renew(self, peer: PeerId, renewal: int) -> None:
        node = self.of_session(peer)
        if node is not None:
            node.lease_until_ms = self._turn.now_ms + self._config.ttl_ms
            self._turn.send(peer, LeaseRenewed(renewal, self._config.ttl_ms))

    def drain(self, peer: PeerId) -> None:
        node = self.of_session(peer)
        if node is not None and not node.draining:
            # At once, not when it is durable: to place less is always safe.
            node.draining = True
            self._store.submit(DrainNode(node.incarnation, "announced"), lambda _: None)
            self._turn.emit(NodeDraining(node.incarnation))

    # Evidence (P13)

    def close(self, peer: PeerId, end: StreamEnd) -> None:
        """A stream ended: half of evidence B; the dial is the other half."""
        node_id = self._sessions.pop(peer, None)
        node = self._nodes.get(node_id) if node_id is not None else None
        if node is None:
            return
        if node.successor is not None and node.successor.peer == peer:
            node.successor = None
        if node.session == peer:
            node.session = None
            node.redial_ms = 0
            if not node.fencing:
                self._dial(node)

    def report_unreachable(self, report: ReportUnreachable) -> None:
        node = self.get(report.incarnation)
        if node is None:
            if report.incarnation.node_id not in self._joining:
                # The edge missed the push; tell it again. (While a process joins under that
                # name it can't be told yet whether it is the one that was reported.)
                self._turn.send(report.peer, NodeFenced(report.incarnation, "fenced before"))
        elif not node.fencing:
            node.reported_ms = self._turn.now_ms
            self._dial(node)
            self._suspect(node)

    def report_death(self, report: ReportDeath) -> None:
        """Evidence A. A report of another process than the living one changes nothing."""
        node = self._nodes.get(report.node_id)
        if node is None or node.record.claim.pid != report.pid:
            self._turn.send(report.peer, DeathRecorded(False))
            return
        node.deaths.append(report.peer)
        if not node.fencing:
            self._fence(node, "process ended", Evidence.PROOF, report.evidence)

    def finish_dial(self, dial: DialId, outcome: DialOutcome) -> None:
        node = self._dials.pop(dial, None)
        if node is None or node.dial != dial:
            return
        node.dial = None
        if node.fencing or self._nodes.get(node.incarnation.node_id) is not node:
            return
        if node.session is None and outcome is DialOutcome.REFUSED:
            cause = "stopped" if node.draining else "lost"
            self._fence(
                node,
                cause,
                Evidence.BROKEN_AND_REFUSED,
                f"no stream, and {node.record.claim.address} refuses",
            )
        elif node.session is None:
            # Dying processes may close their stream before their listener: look again soon.
            first, most = self._config.redial_first_ms, self._config.redial_most_ms
            node.redial_ms = min(node.redial_ms * 2, most) if node.redial_ms else first
            node.redial_at_ms = self._turn.now_ms + node.redial_ms
        elif outcome is DialOutcome.REFUSED:
            node.reported_ms = self._turn.now_ms
            self._suspect(node)

    def _suspect(self, node: Node) -> None:
        """Evidence C: three missed beats, and a second observer who can't reach it either."""
        now = self._turn.now_ms
        if (
            node.session is not None
            and node.reported_ms is not None
            and now >= self._grace_until_ms
            and now - node.reported_ms < self._config.report_window_ms
            and now - node.last_beat_ms >= self._config.stale_ms
        ):
            silent = now - node.last_beat_ms
            detail = f"silent for {silent} ms, and a second observer can't reach it"
            self._fence(node, "silent", Evidence.MISSED_BEATS, detail)

    def _dial(self, node: Node) -> None:
        node.redial_at_ms = None
        if node.dial is None:
            self._last_dial += 1
            node.dial = DialId(self._last_dial)
            self._dials[node.dial] = node
            self._turn.emit(Dial(node.dial, node.record.claim.address))

    # Fencing (P12)

    def gone(self, incarnation: NodeIncarnation) -> None:
        """The store says that this incarnation is not there: evidence D at once."""
        node = self.get(incarnation)
        if node is not None and not node.fencing:
            self._fence(node, "gone from the store", Evidence.LEASE_OVER, "")

    def _fence(self, node: Node, cause: str, evidence: Evidence, detail: str) -> None:
        node.fencing = True
        node.redial_at_ms = None
        fence = FenceNode(node.incarnation, cause, evidence, detail)
        self._store.submit(fence, lambda answer: self._fenced(node, fence), first=True)

    def _fenced(self, node: Node, fence: FenceNode) -> None:
        turn = self._turn
        del self._nodes[node.incarnation.node_id]
        message = NodeFenced(node.incarnation, fence.cause)
        if node.session is not None:
            turn.send(node.session, message)
            turn.emit(Close(node.session))
            self._sessions.pop(node.session, None)
        turn.tell_edges(message)
        for peer in node.deaths:
            turn.send(peer, DeathRecorded(True))
        turn.emit(NodeLost(node.incarnation, fence.cause, fence.evidence, fence.detail))
        turn.more_room = True
        if node.successor is not None:
            self._join(node.successor)

    def _record_refusal(self, kind: str, detail: str, incarnation: NodeIncarnation) -> None:
        self._store.submit(RecordRefusal(kind, detail, node=incarnation), lambda _: None)
        self._turn.emit(RefusalRecorded(kind, detail))

    # Time

    def tick(self) -> None:
        """Beats, leases that ended, dials that are due."""
        now = self._turn.now_ms
        for node in list(self._nodes.values()):
            if node.fencing:
                continue
            if now >= node.lease_until_ms:
                held = "open" if node.session is not None else "broken"
                self._fence(node, "lease over", Evidence.LEASE_OVER, f"its stream was {held}")
                continue
            self._suspect(node)
            if node.redial_at_ms is not None and now >= node.redial_at_ms and not node.fencing:
                self._dial(node)
        if now >= self._beat_at_ms:
            self._beat += 1
            self._beat_at_ms = now + self._config.beat_ms
            for node in self._nodes.values():
                if node.session is not None and not node.fencing:
                    self._turn.send(node.session, RegistryBeat(self._beat))

    def next_deadline(self) -> int | None:
        """When `tick` has something to do; None without nodes."""
        deadlines = [self._beat_at_ms] if self._nodes else []
        for node in self._nodes.values():
            if node.fencing:
                continue
            deadlines.append(node.lease_until_ms)
            if node.redial_at_ms is not None:
                deadlines.append(node.redial_at_ms)
            if node.reported_ms is not None and node.session is not None:
                due = max(node.last_beat_ms + self._config.stale_ms, self._grace_until_ms)
                if self._turn.now_ms < due < node.reported_ms + self._config.report_window_ms:
                    deadlines.append(due)
        return min(deadlines) if deadlines else None
