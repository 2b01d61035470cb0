"""The table of living nodes: what is known of each, and which one should take a user.

Only data and questions. What changes it: `Joining` adds, `Evidence` and `Fencing` remove,
`Moves` drains. The choice is a suggestion and never unsafe; the store compares.
"""

from collections.abc import Iterator

from registry_service.core.commands import DialId, OpenNodeSession, PeerId
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import Message, NodeStatus
from registry_service.core.rendezvous import choose
from registry_service.core.transactions import NodeRecord
from registry_service.core.turn import Turn
from steward.model.keys import NodeId, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.model.rendezvous import node_half

_REMEMBERED_ZONES = 256
_UNLIMITED = 1 << 30


class Node:
    """One living incarnation, as this process sees it."""

    __slots__ = (
        "awaiting",
        "dial",
        "draining",
        "fencing",
        "half",
        "incarnation",
        "last_beat_ms",
        "lease_until_ms",
        "log_away_since_ms",
        "log_back_at_ms",
        "managers",
        "most",
        "node_id",
        "placements",
        "placing",
        "proven",
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
        self.node_id = record.claim.node_id
        self.half = node_half(self.node_id)
        # How many users it may have.
        self.most = record.claim.capacity or _UNLIMITED
        self.draining = record.draining
        self.lease_until_ms = lease_until_ms
        self.placements = placements
        # Users whose placing on it is in flight.
        self.placing = 0
        self.managers = 0
        self.session: PeerId | None = None
        self.last_beat_ms = 0
        # Since when its beats say that it can't reach the log.
        self.log_away_since_ms: int | None = None
        # Since when it is known to reach it, if it does.
        self.log_back_at_ms = 0
        self.fencing = False
        # Its process was reaped.
        self.proven = False
        self.dial: DialId | None = None
        self.redial_at_ms: int | None = None
        self.redial_ms = 0
        self.reported_ms: int | None = None
        self.refused_nonce = ""
        # Who waits until this incarnation is fenced: the next process, and what to tell to whom.
        self.successor: OpenNodeSession | None = None
        self.awaiting: list[tuple[PeerId, Message]] = []

    @property
    def zone(self) -> str:
        return self.record.claim.zone

    @property
    def load(self) -> int:
        return self.placements + self.placing

    @property
    def room(self) -> int:
        """How many users more it can take."""
        return max(0, self.most - self.load)

    def status(self) -> NodeStatus:
        return NodeStatus(self.record, self.draining, self.managers)


class NodeTable:
    """The nodes of the cluster by name, and by session."""

    def __init__(self, config: RegistryConfig, turn: Turn) -> None:
        self._config = config
        self._turn = turn
        self._nodes: dict[NodeId, Node] = {}
        # Also sessions of processes that are joining.
        self.sessions: dict[PeerId, NodeId] = {}
        self._lost_zones: dict[NodeIncarnation, str] = {}
        self._takers: dict[NodeIncarnation | None, list[Node]] = {}

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    def add(self, node: Node) -> None:
        self._nodes[node.node_id] = node
        self._turn.cluster_changed = True

    def remove(self, node: Node) -> None:
        """It is fenced. Its zone is remembered a while: its users should go to another one."""
        del self._nodes[node.node_id]
        if node.zone:
            self._lost_zones[node.incarnation] = node.zone
            if len(self._lost_zones) > _REMEMBERED_ZONES:
                del self._lost_zones[next(iter(self._lost_zones))]
        self._turn.cluster_changed = True

    def named(self, node_id: NodeId) -> Node | None:
        return self._nodes.get(node_id)

    def get(self, incarnation: NodeIncarnation) -> Node | None:
        """The node, if exactly this incarnation is the living one."""
        node = self._nodes.get(incarnation.node_id)
        if node is None or node.incarnation.node_rev != incarnation.node_rev:
            return None
        return node

    def holder(self, placement: Placement) -> Node | None:
        """The node of a placement, if that incarnation is the living one."""
        node = self._nodes.get(placement.node_id)
        if node is None or node.incarnation.node_rev != placement.node_rev:
            return None
        return node

    def lives(self, node_id: NodeId, node_rev: int) -> bool:
        """Whether placements on this incarnation count."""
        node = self._nodes.get(node_id)
        return node is not None and node.incarnation.node_rev == node_rev and not node.fencing

    def of_session(self, peer: PeerId) -> Node | None:
        """The living node that holds this session."""
        node_id = self.sessions.get(peer)
        node = self._nodes.get(node_id) if node_id is not None else None
        if node is None or node.session != peer or node.fencing:
            return None
        return node

    def lost_zone(self, incarnation: NodeIncarnation) -> str:
        """The zone of an incarnation that was fenced not long ago; empty if not known."""
        return self._lost_zones.get(incarnation, "")

    # Who takes users

    @property
    def any_up(self) -> bool:
        return any(node.session is not None and not node.fencing for node in self)

    def room(self, but: NodeIncarnation) -> int:
        """How many users all takers but one have room for."""
        takers = self.takers(but)
        return sum(node.room for node in takers)

    def takers(self, but: NodeIncarnation | None = None) -> list[Node]:
        """Nodes that could take a user: up and not draining.

        Those that beat, and that reach the log, are preferred: others are among them only when
        no node does better.
        """
        takers = self._takers.get(but)
        if takers is None:
            takers = self._takers[but] = self._find_takers(but)
        return takers

    def look_anew(self) -> None:
        """Forget who takes users: nodes may have changed. Between two calls one answer serves."""
        self._takers.clear()

    def _find_takers(self, but: NodeIncarnation | None) -> list[Node]:
        if not self._turn.may_place:
            return []
        up = [
            node
            for node in self._nodes.values()
            if node.session is not None
            and not node.draining
            and not node.fencing
            and node.incarnation != but
        ]
        oldest = self._turn.now_ms - self._config.stale_ms
        fresh = [node for node in up if node.last_beat_ms > oldest] or up
        return [node for node in fresh if node.log_away_since_ms is None] or fresh

    def choose(
        self, user: UserKey, *, but: NodeIncarnation | None = None, not_zone: str = ""
    ) -> Node | None:
        """A node for this user, below its bound; None when every one is full or there is none.

        A user of a node that was lost goes to another zone than that one's if one has room.
        """
        takers = self.takers(but)
        if not_zone:
            elsewhere = [node for node in takers if node.zone != not_zone]
            chosen = choose(user, elsewhere)
            if chosen is not None:
                return chosen
        return choose(user, takers)
