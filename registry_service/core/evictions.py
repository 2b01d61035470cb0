"""Evictions: end a user's sessions everywhere, and take the placement away.

Every edge is told, not only those that asked: an edge may have asked before this process
started. The node is told to end the manager; the placement is removed, by compare and delete,
when it was released, or after a bound when the node is silent.

A silent node may still be executing. So the placement of a user of a strict tenant is never removed
without its node: it is over when the node released it or was fenced (and the next one is made
under the hold); a node that lives and does not let go makes it a refusal. It does not guarantee
that the user stays away: who may connect is decided at the door.
"""

from collections import deque
from collections.abc import Callable, Iterator

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
    __slots__ = ("began_ms", "deadline_ms", "done", "peers", "placement", "removing", "strict")

    def __init__(
        self, placement: Placement, peers: list[PeerId], now_ms: int, wait_ms: int, *, strict: bool
    ) -> None:
        self.placement = placement
        self.peers = peers
        self.began_ms = now_ms
        self.deadline_ms = now_ms + wait_ms
        self.strict = strict
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
        # By how long they may take: in the order of their deadlines.
        self._deadlines: deque[_Eviction] = deque()
        self._strict_deadlines: deque[_Eviction] = deque()

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
        strict = placement.user.tenant in self._config.strict_tenants
        # Long enough for a silent node to be fenced.
        wait_ms = self._config.evict_wait_ms + (self._config.ttl_ms if strict else 0)
        eviction = _Eviction(placement, peers, self._turn.now_ms, wait_ms, strict=strict)
        self._evictions[placement.user] = eviction
        (self._strict_deadlines if strict else self._deadlines).append(eviction)
        self._tell_node(eviction)

    def _tell_node(self, eviction: _Eviction) -> None:
        placement = eviction.placement
        node = self._nodes.get(placement.incarnation)
        if node is None or (node.fencing and not eviction.strict):
            self._over(eviction)
        elif node.fencing:
            pass  # Over when the fence is in the store.
        elif node.session is not None:
            owned = OwnedUser(placement.user, placement.epoch)
            self._turn.send(node.session, EvictManagers((owned,)))

    def _over(self, eviction: _Eviction) -> None:
        """Its node is over, and what is left of the placement counts no more."""
        if eviction.strict:
            self._end(eviction)
        else:
            self._remove_now(eviction)

    def _remove_now(self, eviction: _Eviction) -> None:
        if not eviction.removing:
            eviction.removing = True
            self._remove(eviction.placement, EVICT, lambda: self._end(eviction))

    def _end(self, eviction: _Eviction) -> None:
        if eviction.done:
            return
        placement = eviction.placement
        self._forget(eviction)
        for peer in eviction.peers:
            self._turn.send(peer, UserEvicted(placement.epoch))
        took_ms = self._turn.now_ms - eviction.began_ms
        self._turn.emit(PlacementEnded(placement.user, EVICT, took_ms))

    def _forget(self, eviction: _Eviction) -> None:
        eviction.done = True
        del self._evictions[eviction.placement.user]

    def _refuse(self, eviction: _Eviction) -> None:
        took = f"{(eviction.deadline_ms - eviction.began_ms) / 1000:g} s"
        why = (
            f"node {eviction.placement.node_id} did not let go of the user in {took}, and tenant "
            f"{eviction.placement.user.tenant!r} is strict; ask again, or fence the node"
        )
        self._forget(eviction)
        for peer in eviction.peers:
            self._turn.send(peer, Refused(Reason.MANAGER_UNAVAILABLE, why))

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
                self._over(eviction)

    # Time

    def tick(self) -> None:
        for eviction in self._due(self._deadlines):
            self._remove_now(eviction)
        for eviction in self._due(self._strict_deadlines):
            self._refuse(eviction)

    def _due(self, deadlines: deque[_Eviction]) -> Iterator[_Eviction]:
        while deadlines and (deadlines[0].done or deadlines[0].deadline_ms <= self._turn.now_ms):
            eviction = deadlines.popleft()
            if not eviction.done:
                yield eviction

    def next_deadline(self) -> int | None:
        known: list[int] = []
        for deadlines in (self._deadlines, self._strict_deadlines):
            while deadlines and deadlines[0].done:
                deadlines.popleft()
            if deadlines:
                known.append(deadlines[0].deadline_ms)
        return min(known, default=None)
