"""Evictions: end a user's sessions everywhere, and take the placement away.

Every edge is told, not only those that asked: an edge may have asked before this process
started. The node is told to end the manager; the placement is removed, by compare and delete,
when it was released, or after a bound when the node is silent. It does not guarantee that the
user stays away: who may connect is decided at the door.
"""

from collections import deque
from collections.abc import Callable

from registry_service.core.commands import EvictUser, PeerId
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import (
    EvictManagers,
    EvictSessions,
    OwnedUser,
    PlacementEnded,
    Refused,
    UserEvicted,
)
from registry_service.core.node import Node, NodeTable
from registry_service.core.pipeline import Answer, StorePipeline
from registry_service.core.transactions import PlacementRead, ReadPlacement
from registry_service.core.turn import Turn
from steward.errors import Reason
from steward.model.keys import Epoch, UserKey
from steward.model.placement import Placement

EVICT = "evict"
Remove = Callable[[Placement, str, Callable[[], None]], None]


class _Eviction:
    __slots__ = ("began_ms", "deadline_ms", "done", "peers", "placement", "removing")

    def __init__(
        self, placement: Placement, peers: list[PeerId], now_ms: int, wait_ms: int
    ) -> None:
        self.placement = placement
        self.peers = peers
        self.began_ms = now_ms
        self.deadline_ms = now_ms + wait_ms
        self.removing = False
        self.done = False


class Evictions:
    """Evictions in progress, one per user. `remove` deletes a placement without its node."""

    def __init__(
        self,
        config: RegistryConfig,
        turn: Turn,
        store: StorePipeline,
        nodes: NodeTable,
        remove: Remove,
    ) -> None:
        self._config = config
        self._turn = turn
        self._store = store
        self._nodes = nodes
        self._remove = remove
        self._evictions: dict[UserKey, _Eviction] = {}
        self._deadlines: deque[_Eviction] = deque()

    def evict(self, command: EvictUser) -> None:
        running = self._evictions.get(command.user)
        if running is not None:
            running.peers.append(command.peer)
            return
        read = ReadPlacement(command.user)
        self._store.submit(read, lambda answer: self._begin(command, answer))

    def _begin(self, command: EvictUser, answer: Answer) -> None:
        assert isinstance(answer.result, PlacementRead)
        placement = answer.result.placement
        if placement is None:
            why = f"user {command.user} is on no node"
            self._turn.send(command.peer, Refused(Reason.NOT_FOUND, why))
            return
        if command.user in self._evictions:
            self._evictions[command.user].peers.append(command.peer)
            return
        self._turn.tell_edges(EvictSessions(command.user, command.cause))
        self._start(placement, [command.peer])

    def _start(self, placement: Placement, peers: list[PeerId]) -> None:
        eviction = _Eviction(placement, peers, self._turn.now_ms, self._config.evict_wait_ms)
        self._evictions[placement.user] = eviction
        self._deadlines.append(eviction)
        self._tell_node(eviction)

    def _tell_node(self, eviction: _Eviction) -> None:
        placement = eviction.placement
        node = self._nodes.get(placement.incarnation)
        if node is None or node.fencing:
            self._remove_now(eviction)
        elif node.session is not None:
            owned = OwnedUser(placement.user, placement.epoch)
            self._turn.send(node.session, EvictManagers((owned,)))

    def _remove_now(self, eviction: _Eviction) -> None:
        if not eviction.removing:
            eviction.removing = True
            self._remove(eviction.placement, EVICT, lambda: self._end(eviction))

    def _end(self, eviction: _Eviction) -> None:
        if eviction.done:
            return
        eviction.done = True
        placement = eviction.placement
        del self._evictions[placement.user]
        for peer in eviction.peers:
            self._turn.send(peer, UserEvicted(placement.epoch))
        took_ms = self._turn.now_ms - eviction.began_ms
        self._turn.emit(PlacementEnded(placement.user, EVICT, took_ms))

    # What happens meanwhile

    def released(self, user: UserKey, epoch: Epoch) -> None:
        """Its node gave the placement up."""
        eviction = self._evictions.get(user)
        if eviction is not None and eviction.placement.epoch == epoch:
            self._end(eviction)

    def moved(self, placement: Placement) -> None:
        """A planned move was faster: the new node has to end it."""
        eviction = self._evictions.get(placement.user)
        if eviction is not None:
            eviction.done = True
            self._start(placement, eviction.peers)

    def resumed(self, node: Node) -> None:
        """A node has a new stream: what was told on the old one may be lost."""
        for eviction in list(self._evictions.values()):
            if eviction.placement.incarnation == node.incarnation:
                self._tell_node(eviction)

    def fenced(self, node: Node) -> None:
        for eviction in list(self._evictions.values()):
            if eviction.placement.incarnation == node.incarnation:
                self._remove_now(eviction)

    # Time

    def tick(self) -> None:
        while self._deadlines and (
            self._deadlines[0].done or self._deadlines[0].deadline_ms <= self._turn.now_ms
        ):
            eviction = self._deadlines.popleft()
            if not eviction.done:
                self._remove_now(eviction)

    def next_deadline(self) -> int | None:
        while self._deadlines and self._deadlines[0].done:
            self._deadlines.popleft()
        return self._deadlines[0].deadline_ms if self._deadlines else None
