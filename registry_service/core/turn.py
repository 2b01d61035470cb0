"""What the parts of the machine share while one command is handled.

A `Turn` holds the time of the command and collects effects. It fixes the order in which
they leave: transactions first, then grants before answers, so that a node
mostly knows a placement before an edge comes with it; then the rest as it was made.
"""

from registry_service.core.commands import PeerId
from registry_service.core.effects import (
    Commit,
    Effect,
    Message,
    PlacementsGranted,
    Send,
)
from steward.model.keys import EdgeId, Revision
from steward.model.placement import Placement


class Turn:
    """One object for the life of a machine; `begin` and `finish` enclose each command."""

    __slots__ = (
        "_commits",
        "_effects",
        "_grants",
        "cluster_changed",
        "edges",
        "generation",
        "may_place",
        "more_room",
        "now_ms",
        "revision",
    )

    def __init__(self) -> None:
        self.now_ms = 0
        self.revision = Revision(0)
        self.generation = 0
        # Open edge sessions, in the order in which they came.
        self.edges: dict[PeerId, EdgeId] = {}
        # Something happened that may let waiting resolves go on.
        self.more_room = False
        # The nodes that live, or that take users, are others than before.
        self.cluster_changed = False
        # No new placement while it is not known that its epoch is above the log's largest fence.
        self.may_place = False
        self._commits: list[Effect] = []
        self._grants: dict[tuple[PeerId, bool], list[Placement]] = {}
        self._effects: list[Effect] = []

    def begin(self, now_ms: int) -> None:
        self.now_ms = now_ms

    def commit(self, commit: Commit) -> None:
        self._commits.append(commit)

    def grant(self, node_session: PeerId, placement: Placement, activate: bool) -> None:
        """Push a placement to its node; those of one turn and kind travel as one message."""
        grants = self._grants.get((node_session, activate))
        if grants is None:
            grants = self._grants[node_session, activate] = []
        if activate:
            plain = self._grants.get((node_session, False))
            if plain is not None and placement in plain:
                plain.remove(placement)
        grants.append(placement)

    def send(self, peer: PeerId, message: Message) -> None:
        self._effects.append(Send(peer, message))

    def tell_edges(self, message: Message) -> None:
        """One push to every edge, for any number of users."""
        for peer in self.edges:
            self._effects.append(Send(peer, message))

    def emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def finish(self) -> list[Effect]:
        """The effects of this turn, in the order in which the driver must perform them."""
        effects = self._commits
        for (peer, activate), placements in self._grants.items():
            if placements:
                effects.append(Send(peer, PlacementsGranted(tuple(placements), activate)))
        effects += self._effects
        self._commits, self._grants, self._effects = [], {}, []
        return effects
