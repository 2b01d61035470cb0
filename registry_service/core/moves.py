"""Planned moves: a drain, by the node or by an operator, and the move of one user (P16).

The node is asked to hand off users, in waves; each handoff it writes to the log and then
releases here, and the release and the new placement are one compare in the store. Guarantees:
nobody is asked for while no other node could take the user; a user is on one node or the other,
never on none, unless the last other node went away in between; edges that asked for the user
are told, and resolves that wait are answered, when the new placement is durable. A node that
dies meanwhile is a failover like any other. What the registry does not know is who is idle: the
node orders the users of a wave.
"""

from collections.abc import Callable

from registry_service.core.commands import DrainNode, MoveUser, PeerId, Release
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import (
    HandOffUsers,
    NodeDrained,
    NodeDraining,
    OwnedUser,
    PlacementEnded,
    PlacementMoved,
    Refused,
)
from registry_service.core.handoffs import Handoffs
from registry_service.core.node import Node, NodeTable
from registry_service.core.pipeline import Answer, StorePipeline
from registry_service.core.placements import Placements
from registry_service.core.resolver import Resolver
from registry_service.core.transactions import (
    ListPlacements,
    MarkDraining,
    PlacementPage,
    PlacementReleased,
    TakeOver,
    UserTakenOver,
)
from registry_service.core.turn import Turn
from registry_service.core.user_moves import UserMoves
from steward.errors import Reason
from steward.model.keys import GENERATION_SHIFT, Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement

DRAIN = "drain"
MOVE = "move"
_REVISION_MASK = (1 << GENERATION_SHIFT) - 1


class Moves:
    """Drains and moves. Its callers: commands of operators and nodes, and `Releases`."""

    def __init__(
        self,
        config: RegistryConfig,
        turn: Turn,
        store: StorePipeline,
        nodes: NodeTable,
        placements: Placements,
        resolver: Resolver,
    ) -> None:
        self._config = config
        self._turn = turn
        self._store = store
        self._nodes = nodes
        self._placements = placements
        self._resolver = resolver
        self._handoffs: dict[NodeIncarnation, Handoffs] = {}
        self._users = UserMoves(config, turn, store, nodes, self._ask_for)
        # Called with each user that was taken over.
        self.listeners: list[Callable[[Placement], None]] = []

    # Drains

    def announce(self, peer: PeerId) -> None:
        """A node says that it is going to stop."""
        node = self._nodes.of_session(peer)
        if node is not None and not node.draining:
            self._drain(node, "announced", lambda: None)

    def drain(self, command: DrainNode) -> None:
        """An operator wants a node empty; answered when that is durable."""
        node = self._nodes.named(command.node_id)
        if node is None or node.fencing:
            unknown = f"there is no node {command.node_id!r}; see `steward status`"
            self._turn.send(command.peer, Refused(Reason.NOT_FOUND, unknown))
            return

        def durable() -> None:
            answer = NodeDrained(node.incarnation.node_rev, node.placements)
            self._turn.send(command.peer, answer)

        self._drain(node, "operator", durable)

    def _drain(self, node: Node, cause: str, durable: Callable[[], None]) -> None:
        if not node.draining:
            # At once, not when it is durable: to place less is always safe.
            node.draining = True
            self._turn.cluster_changed = True
            self._turn.emit(NodeDraining(node.incarnation))

        def marked(_: Answer) -> None:
            durable()
            if self._nodes.get(node.incarnation) is node:
                self.empty(node)

        self._store.submit(MarkDraining(node.incarnation, cause), marked)

    def empty(self, node: Node) -> None:
        """A draining node, or one that came back: go on with what it has to hand off."""
        handoffs = self._handoffs.get(node.incarnation)
        if handoffs is None:
            if not node.draining:
                return
            handoffs = Handoffs(node.incarnation, drain=True)
            self._handoffs[node.incarnation] = handoffs
        elif node.draining and handoffs.listed and handoffs.after is None:
            handoffs.listed = False  # Until now it had single moves only.
        if node.session is not None and handoffs.open:
            # It has a new stream: what was asked on the old one may be lost.
            users = tuple(OwnedUser(user, epoch) for user, epoch in handoffs.open.items())
            self._turn.send(node.session, HandOffUsers(users, self._cause(node)))
        self._ask_next(handoffs)

    def fenced(self, node: Node) -> None:
        """Its users are placed on demand now, as after any death."""
        self._handoffs.pop(node.incarnation, None)
        self._users.fenced(node)

    # Moves of one user

    def move(self, command: MoveUser) -> None:
        """An operator wants one user on another node."""
        self._users.move(command)

    def _ask_for(self, placement: Placement) -> None:
        """Ask for this user before all others of its node."""
        self._placements.learn(placement)
        handoffs = self._handoffs.get(placement.incarnation)
        if handoffs is None:
            handoffs = Handoffs(placement.incarnation, drain=False)
            self._handoffs[placement.incarnation] = handoffs
        handoffs.waiting.appendleft(OwnedUser(placement.user, placement.epoch))
        self._ask_next(handoffs)

    # Asking the node

    def ask_all(self) -> None:
        """A node came or has room: go on where nobody could take a user."""
        for handoffs in list(self._handoffs.values()):
            self._ask_next(handoffs)

    def _ask_next(self, handoffs: Handoffs) -> None:
        """Ask the node for as many users as may be open, and read on when few wait."""
        node = self._nodes.get(handoffs.incarnation)
        if node is None or node.fencing:
            return
        # Those who were asked for elsewhere need a place too.
        promised = sum(len(each.open) for each in self._handoffs.values())
        room = min(
            self._config.handoffs_at_once - len(handoffs.open),
            self._nodes.room(node.incarnation) - promised,
        )
        asked: list[OwnedUser] = []
        while node.session is not None and handoffs.waiting and len(asked) < room:
            owned = handoffs.waiting[0]
            known = self._placements.living(owned.user)
            if (
                owned.user in handoffs.open
                or (known is not None and known.epoch != owned.epoch)
                or (owned.user not in self._users and not node.draining)
            ):
                handoffs.waiting.popleft()  # Over already.
                continue
            if self._users.target(owned.user, node.incarnation) is None:
                if owned.user in self._users:
                    # Its own target went, or is full: nobody behind it waits for that.
                    self._users.give_up(owned.user)
                    continue
                break
            handoffs.waiting.popleft()
            handoffs.ask(owned, self._turn.now_ms)
            asked.append(owned)
        if asked and node.session is not None:
            self._turn.send(node.session, HandOffUsers(tuple(asked), self._cause(node)))
        few = self._config.handoffs_at_once
        if not handoffs.listed and not handoffs.listing and len(handoffs.waiting) < few:
            handoffs.listing = True
            page = ListPlacements(handoffs.incarnation, handoffs.after, self._config.list_page)
            self._store.submit(page, lambda answer: self._listed(handoffs, answer))
        if handoffs.idle and not node.draining:
            self._handoffs.pop(handoffs.incarnation, None)

    def _listed(self, handoffs: Handoffs, answer: Answer) -> None:
        assert isinstance(answer.result, PlacementPage)
        handoffs.add_page(answer.result.placements, answer.result.more)
        self._ask_next(handoffs)

    @staticmethod
    def _cause(node: Node) -> str:
        return DRAIN if node.draining else MOVE

    # What the node lets go: called by `Releases`

    def wants(self, user: UserKey, epoch: Epoch) -> bool:
        """Whether a plain release of this placement is as good as a handoff: it has a target."""
        return self._users.wants(user, epoch)

    def take_over(self, node: Node, release: Release, then: Callable[[Answer], None]) -> None:
        """Put the user on the next node, if `node` holds the placement with this epoch."""
        user, holder = release.user, node.incarnation
        target: Node | None = None

        def make(user: UserKey) -> TakeOver:
            nonlocal target
            target = self._users.target(user, holder)
            if target is not None:
                target.placing += 1
            where = target.incarnation if target is not None else None
            return TakeOver(user, release.epoch, holder, where, release.cause)

        def told(answer: Answer) -> None:
            if target is not None:
                target.placing -= 1
            then(answer)

        # Before what waits: somebody's run stands still for it.
        self._store.submit_late(make, user, told, first=True)

    def taken_over(self, answer: Answer) -> Placement | None:
        """The new placement, if this operation made it, be it in an attempt that was lost."""
        result, operation = answer.result, answer.operation
        if isinstance(result, UserTakenOver):
            return result.placement
        since = answer.repeated_since
        if (
            isinstance(operation, TakeOver)
            and isinstance(result, PlacementReleased)
            and result.current is not None
            and since is not None
            and result.current.epoch & _REVISION_MASK > since
            and result.current.incarnation == operation.target
            and result.current != self._placements.last(operation.user)
        ):
            return result.current
        return None

    def finish(self, release: Release, placement: Placement) -> None:
        """The user is on its new node, durably: tell everybody who should know."""
        user = release.user
        self._placements.begin(placement, activate=release.activate)
        for peer in self._placements.asked(user):
            self._turn.send(peer, PlacementMoved(placement))
        self._resolver.moved(placement)
        self._users.moved(user, release.epoch, placement)
        for listener in self.listeners:
            listener(placement)

    def let_go(self, user: UserKey, epoch: Epoch) -> None:
        """This placement is over, whatever came of it."""
        self._users.over(user, epoch)
        for handoffs in list(self._handoffs.values()):
            asked_ms = handoffs.close(user, epoch)
            if asked_ms is not None:
                node = self._nodes.get(handoffs.incarnation)
                cause = self._cause(node) if node is not None else DRAIN
                took_ms = self._turn.now_ms - asked_ms
                self._turn.emit(PlacementEnded(user, cause, took_ms))
            if not handoffs.open or asked_ms is not None:
                # Its own next one, or one that waited for the room that this user left.
                self._ask_next(handoffs)

    # Time

    def tick(self) -> None:
        """End moves whose node took too long, and turn to the next users of a node that does."""
        self._users.tick()
        now = self._turn.now_ms
        for handoffs in list(self._handoffs.values()):
            oldest = handoffs.next_overdue_ms()
            if oldest is not None and oldest + self._config.handoff_wait_ms <= now:
                handoffs.overdue(now - self._config.handoff_wait_ms)
                self._ask_next(handoffs)

    def next_deadline(self) -> int | None:
        moving = self._users.next_deadline()
        deadlines = [moving] if moving is not None else []
        for handoffs in self._handoffs.values():
            oldest = handoffs.next_overdue_ms()
            if oldest is not None:
                deadlines.append(oldest + self._config.handoff_wait_ms)
        return min(deadlines, default=None)
