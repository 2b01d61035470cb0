"""Beats, leases, broken streams, and what of it proves or suggests that a node is over (P13).

Guarantees: a node is fenced only on evidence of the classes A to E. In a grace (after a
restart, or after this process was paused) only A, B and E fence: what the registry missed is no
evidence against anybody. A node that can't reach the log, while others can, is moved away from
like a silent one (C): nobody who is on it can go on.
"""

from registry_service.core.commands import (
    DialId,
    DialOutcome,
    PeerId,
    ReceiveBeat,
    ReportDeath,
    ReportUnreachable,
    StreamEnd,
)
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import (
    DeathRecorded,
    Dial,
    GraceBegun,
    LeaseRenewed,
    NodeFenced,
    RegistryBeat,
)
from registry_service.core.fencing import Fencing
from registry_service.core.holds import Holds
from registry_service.core.node import Node, NodeTable
from registry_service.core.transactions import Evidence, StoreView
from registry_service.core.turn import Turn


class Observation:
    """What the registry sees of nodes, and what it makes of it."""

    def __init__(
        self, config: RegistryConfig, turn: Turn, nodes: NodeTable, fencing: Fencing, holds: Holds
    ) -> None:
        self._config = config
        self._turn = turn
        self._nodes = nodes
        self._fencing = fencing
        self._holds = holds
        self._dials: dict[DialId, Node] = {}
        self._last_dial = 0
        self._beat = 0
        self._beat_at_ms = 0
        self._grace_until_ms = 0

    @property
    def in_grace(self) -> bool:
        return self._turn.now_ms < self._grace_until_ms

    def recover(self, view: StoreView) -> None:
        """Take the nodes of the store; dial them all: a dead one need not cost its lease."""
        counts = dict(view.placements)
        self._begin_grace("registry started")
        for record in view.nodes:
            users = counts.get(record.incarnation, 0)
            self.adopt(Node(record, self._grace_until_ms, users))

    def adopt(self, node: Node) -> None:
        """Take a node that is in the store and has no stream: look whether it is there."""
        self._nodes.add(node)
        self.dial(node)

    def survive_pause(self) -> None:
        """This process was away: what it missed is no evidence against anybody."""
        self._begin_grace("registry was paused")
        for node in self._nodes:
            node.lease_until_ms = max(node.lease_until_ms, self._grace_until_ms)
            node.last_beat_ms = self._turn.now_ms

    def _begin_grace(self, cause: str) -> None:
        self._grace_until_ms = self._turn.now_ms + self._config.ttl_ms
        self._turn.emit(GraceBegun(cause, self._grace_until_ms))

    # Living

    def beat(self, beat: ReceiveBeat) -> None:
        node = self._nodes.of_session(beat.peer)
        if node is None:
            return
        node.last_beat_ms = self._turn.now_ms
        node.managers = beat.managers
        if not beat.log_reachable:
            if node.log_away_since_ms is None:
                node.log_away_since_ms = self._turn.now_ms
        elif node.log_away_since_ms is not None:
            node.log_away_since_ms = None
            node.log_back_at_ms = self._turn.now_ms
            self._turn.more_room = True

    def renew(self, peer: PeerId, renewal: int) -> None:
        node = self._nodes.of_session(peer)
        if node is not None:
            node.lease_until_ms = self._turn.now_ms + self._config.ttl_ms
            self._turn.send(peer, LeaseRenewed(renewal, self._config.ttl_ms))

    # Evidence

    def close(self, peer: PeerId, _: StreamEnd) -> None:
        """A stream ended, however: half of evidence B; the dial is the other half."""
        node_id = self._nodes.sessions.pop(peer, None)
        node = self._nodes.named(node_id) if node_id is not None else None
        if node is None:
            return
        if node.successor is not None and node.successor.peer == peer:
            node.successor = None
        if node.session == peer:
            node.session = None
            node.redial_ms = 0
            if not node.fencing:
                self.dial(node)

    def report_unreachable(self, report: ReportUnreachable, joining: bool) -> None:
        """An edge can't reach a node. `joining` says that a process is joining under its name."""
        node = self._nodes.get(report.incarnation)
        if node is None:
            if not joining:
                # The edge missed the push; tell it again. (While a process joins under that
                # name it can't be told yet whether it is the one that was reported.)
                self._turn.send(report.peer, NodeFenced(report.incarnation, "fenced before"))
        elif not node.fencing:
            node.reported_ms = self._turn.now_ms
            self.dial(node)
            self._suspect(node)

    def report_death(self, report: ReportDeath) -> None:
        """Evidence A. A report of another process than the living one fences nobody."""
        node = self._nodes.named(report.node_id)
        if node is None or node.record.claim.pid != report.pid:
            self._holds.prove(report.node_id, report.pid)
            self._turn.send(report.peer, DeathRecorded(False))
            return
        node.awaiting.append((report.peer, DeathRecorded(True)))
        node.proven = True
        self._fencing.fence(node, "process ended", Evidence.PROOF, report.evidence)

    def finish_dial(self, dial: DialId, outcome: DialOutcome) -> None:
        node = self._dials.pop(dial, None)
        if node is None or node.dial != dial:
            return
        node.dial = None
        if node.fencing or self._nodes.named(node.node_id) is not node:
            return
        if node.session is None and outcome is DialOutcome.REFUSED:
            cause = "stopped" if node.draining else "lost"
            detail = f"no stream, and {node.record.claim.address} refuses"
            self._fencing.fence(node, cause, Evidence.BROKEN_AND_REFUSED, detail)
        elif node.session is None:
            # Dying processes may close their stream before their listener: look again soon.
            first, most = self._config.redial_first_ms, self._config.redial_most_ms
            node.redial_ms = min(node.redial_ms * 2, most) if node.redial_ms else first
            node.redial_at_ms = self._turn.now_ms + node.redial_ms
        elif outcome is DialOutcome.REFUSED:
            node.reported_ms = self._turn.now_ms
            self._suspect(node)

    def dial(self, node: Node) -> None:
        node.redial_at_ms = None
        if node.dial is None:
            self._last_dial += 1
            node.dial = DialId(self._last_dial)
            self._dials[node.dial] = node
            self._turn.emit(Dial(node.dial, node.record.claim.address))

    def _suspect(self, node: Node) -> None:
        """Evidence C: three missed beats, and a second observer who can't reach it either."""
        now = self._turn.now_ms
        if (
            node.session is not None
            and node.reported_ms is not None
            and not self.in_grace
            and now - node.reported_ms < self._config.report_window_ms
            and now - node.last_beat_ms >= self._config.stale_ms
        ):
            silent = now - node.last_beat_ms
            detail = f"silent for {silent} ms, and a second observer can't reach it"
            self._fencing.fence(node, "silent", Evidence.MISSED_BEATS, detail)

    def _cut_off(self, node: Node) -> None:
        """Also C: its own beats say that it can't reach the log, and a node that takes users can.

        And could for as long: when the log was away for all, who finds it again first says nothing
        about the others. A node without users is left alone: it would only come back and be
        fenced again.
        """
        since = node.log_away_since_ms
        if since is None or not node.placements or self.in_grace:
            return
        now = self._turn.now_ms
        if any(
            other.log_away_since_ms is None
            and now - max(since, other.log_back_at_ms) >= self._config.log_away_ms
            for other in self._nodes.takers(node.incarnation)
        ):
            detail = f"it has not reached the log for {now - since} ms, and others do"
            self._fencing.fence(node, "cut off from the log", Evidence.MISSED_BEATS, detail)

    # Time

    def tick(self) -> None:
        """Beats, leases that ended, dials that are due."""
        now = self._turn.now_ms
        for node in list(self._nodes):
            if node.fencing:
                continue
            if now >= node.lease_until_ms:
                held = "open" if node.session is not None else "broken"
                detail = f"its stream was {held}"
                self._fencing.fence(node, "lease over", Evidence.LEASE_OVER, detail)
                continue
            self._suspect(node)
            self._cut_off(node)
            if node.redial_at_ms is not None and now >= node.redial_at_ms and not node.fencing:
                self.dial(node)
        if now >= self._beat_at_ms:
            self._beat += 1
            self._beat_at_ms = now + self._config.beat_ms
            for node in self._nodes:
                if node.session is not None and not node.fencing:
                    self._turn.send(node.session, RegistryBeat(self._beat))

    def next_deadline(self) -> int | None:
        """When `tick` has something to do; None without nodes."""
        # The rule about the log is looked at with every beat: no deadline of its own.
        deadlines = [self._beat_at_ms] if len(self._nodes) else []
        for node in self._nodes:
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
