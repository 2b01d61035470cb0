"""What is known of placements: the cache, who has how many, and which edges asked for whom.

The truth is in the store; this is a bounded memory of it, and the epoch makes an old answer
harmless. A placement is never replaced by one of a lower epoch, whatever the order in which
answers come. Interest (the edges that asked for a user since it was placed) is one bit per edge;
it is forgotten with the placement, with the edge, and at a restart: an edge that is not told
of a move hears it from the node.
"""

from itertools import islice

from registry_service.core.commands import PeerId
from registry_service.core.config import RegistryConfig
from registry_service.core.node import NodeTable
from registry_service.core.turn import Turn
from steward.model.keys import EdgeId, Epoch, UserKey
from steward.model.placement import Placement

_BITS = 62
_FORGOTTEN_SHIFT = 8


class Placements:
    """Remembered placements and interest. Counts are of the nodes, in `NodeTable`."""

    def __init__(self, config: RegistryConfig, turn: Turn, nodes: NodeTable) -> None:
        self._most = config.cached_placements
        self._turn = turn
        self._nodes = nodes
        self._cache: dict[UserKey, Placement] = {}
        self._interest: dict[UserKey, int] = {}
        self._bits: dict[PeerId, int] = {}
        self._free = [1 << shift for shift in range(_BITS)]
        # Bits of edges that went: in some entries of `_interest` until the next sweep.
        self._stale_bits = 0

    # Placements

    def living(self, user: UserKey) -> Placement | None:
        """The remembered placement, if its incarnation lives."""
        placement = self._cache.get(user)
        if placement is None or not self._nodes.lives(placement.node_id, placement.node_rev):
            return None
        return placement

    def last(self, user: UserKey) -> Placement | None:
        """The remembered placement, also on an incarnation that is over."""
        return self._cache.get(user)

    def learn(self, placement: Placement) -> Placement:
        """Remember what the store said; the newest that is known of this user."""
        user = placement.user
        known = self._cache.get(user)
        if known is not None and known.epoch > placement.epoch:
            return known
        if known is None and len(self._cache) >= self._most:
            self._forget_some()
        self._cache[user] = placement
        return placement

    def _forget_some(self) -> None:
        """Make room, for many at a time: to find the oldest costs more the more were forgotten."""
        for oldest in list(islice(self._cache, max(1, self._most >> _FORGOTTEN_SHIFT))):
            del self._cache[oldest]
            self._interest.pop(oldest, None)

    def begin(self, placement: Placement, *, activate: bool = False) -> Placement:
        """The store put the user there just now: count it, and grant it to its node.

        Returns the newest placement that is known of this user.
        """
        newest = self.learn(placement)
        node = self._nodes.holder(placement)
        if node is not None:
            node.placements += 1
            if node.session is not None and not node.fencing:
                self._turn.grant(node.session, placement, activate)
        return newest

    def end(self, user: UserKey, epoch: Epoch) -> None:
        """The placement with this epoch is over. Its node's count is the caller's."""
        known = self._cache.get(user)
        if known is not None and known.epoch == epoch:
            del self._cache[user]
            self._interest.pop(user, None)

    # Interest

    def open_edge(self, peer: PeerId) -> None:
        if not self._free and self._stale_bits:
            self._sweep()
        # With more edges than bits, the last ones are not told of moves by the registry.
        self._bits[peer] = self._free.pop(0) if self._free else 0

    def close_edge(self, peer: PeerId) -> None:
        self._stale_bits |= self._bits.pop(peer, 0)

    def ask(self, user: UserKey, peer: PeerId) -> None:
        """This edge was answered where the user is."""
        bit = self._bits.get(peer)
        if bit:
            interest = self._interest.get(user, 0)
            if not interest & bit:
                self._interest[user] = interest | bit

    def forget_interest(self, user: UserKey) -> None:
        """The user begins anew somewhere: who cares will ask."""
        self._interest.pop(user, None)

    def asked(self, user: UserKey) -> list[PeerId]:
        """The open sessions of edges that asked for this user."""
        interest = self._interest.get(user, 0)
        return [peer for peer, bit in self._bits.items() if interest & bit]

    def edges(self, user: UserKey) -> tuple[EdgeId, ...]:
        return tuple(self._turn.edges[peer] for peer in self.asked(user))

    def _sweep(self) -> None:
        """Take the bits of edges that went out of all entries: once per 62 edges that went."""
        for user, interest in list(self._interest.items()):
            if interest & self._stale_bits:
                left = interest & ~self._stale_bits
                if left:
                    self._interest[user] = left
                else:
                    del self._interest[user]
        stale, self._stale_bits = self._stale_bits, 0
        self._free = [1 << shift for shift in range(_BITS) if stale & 1 << shift]
