"""Moves of one user that an operator asked for: who waits for them, and where to.

Guarantees: one move of a user at a time, answered once: when the new placement is durable, when
nobody could take the user, when its node was lost, or when it did not let go in time. After a
refusal for time the handoff may still happen; then the user goes where the registry chooses.
"""

from collections import deque
from collections.abc import Callable

from registry_service.core.commands import MoveUser, PeerId
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import Refused, UserMoved
from registry_service.core.node import Node, NodeTable
from registry_service.core.pipeline import Answer, StorePipeline
from registry_service.core.transactions import PlacementRead, ReadPlacement
from registry_service.core.turn import Turn
from steward.errors import Reason
from steward.model.keys import Epoch, NodeId, NodeIncarnation, UserKey
from steward.model.placement import Placement


class _Move:
    __slots__ = ("deadline_ms", "done", "epoch", "holder", "peers", "target", "user")

    def __init__(
        self, placement: Placement, target: NodeId, peer: PeerId, deadline_ms: int
    ) -> None:
        self.user = placement.user
        self.epoch = placement.epoch
        self.holder = placement.incarnation
        # Empty: any other.
        self.target = target
        self.peers = [peer]
        self.deadline_ms = deadline_ms
        self.done = False


class UserMoves:
    """Moves in progress. `ask` asks the node of a placement to hand the user off."""

    def __init__(
        self,
        config: RegistryConfig,
        turn: Turn,
        store: StorePipeline,
        nodes: NodeTable,
        ask: Callable[[Placement], None],
    ) -> None:
        self._config = config
        self._turn = turn
        self._store = store
        self._nodes = nodes
        self._ask = ask
        self._moves: dict[UserKey, _Move] = {}
        # In the order of their deadlines.
        self._deadlines: deque[_Move] = deque()

    def __contains__(self, user: UserKey) -> bool:
        return user in self._moves

    def move(self, command: MoveUser) -> None:
        """Look where the user is, and ask that node to let go."""
        if self._refuse_target(command.peer, command.node_id):
            return
        read = ReadPlacement(command.user)
        self._store.submit(read, lambda answer: self._begin(command, answer))

    def _refuse_target(self, peer: PeerId, node_id: NodeId) -> bool:
        if not node_id:
            return False
        node = self._nodes.named(node_id)
        if node is None or node.fencing:
            unknown = f"there is no node {node_id!r}; see `steward status`"
            self._turn.send(peer, Refused(Reason.NOT_FOUND, unknown))
            return True
        if node.draining:
            why = f"node {node_id} is draining; name another one"
            self._turn.send(peer, Refused(Reason.NODE_DRAINING, why))
            return True
        return False

    def _begin(self, command: MoveUser, answer: Answer) -> None:
        peer, user, target = command.peer, command.user, command.node_id
        assert isinstance(answer.result, PlacementRead)
        placement = answer.result.placement
        node = self._nodes.get(placement.incarnation) if placement is not None else None
        if placement is None or not answer.result.alive or node is None or node.fencing:
            why = f"user {user} is on no node; it is placed when somebody connects"
            self._turn.send(peer, Refused(Reason.NOT_FOUND, why))
            return
        if self._refuse_target(peer, target):
            return
        if placement.node_id == target:
            self._turn.send(peer, UserMoved(placement, placement.node_id))
            return
        moving = self._moves.get(user)
        if moving is not None and moving.epoch == placement.epoch:
            if moving.target == target:
                moving.peers.append(peer)
            else:
                why = f"user {user} is being moved to {moving.target or 'another node'} already"
                self._turn.send(peer, Refused(Reason.MANAGER_UNAVAILABLE, why))
            return
        if self._choose(target, user, placement.incarnation) is None:
            self._turn.send(peer, _nobody_takes(target))
            return
        move = _Move(placement, target, peer, self._turn.now_ms + self._config.move_wait_ms)
        self._moves[user] = move
        self._deadlines.append(move)
        self._ask(placement)

    def _choose(self, target: NodeId, user: UserKey, holder: NodeIncarnation) -> Node | None:
        if not target:
            return self._nodes.choose(user, but=holder)
        node = self._nodes.named(target)
        return node if node in self._nodes.takers(holder) and node.room else None

    def target(self, user: UserKey, holder: NodeIncarnation) -> Node | None:
        """Who gets this user when `holder` lets go, moved or drained; None when nobody can."""
        move = self._moves.get(user)
        return self._choose(move.target if move is not None else NodeId(""), user, holder)

    def wants(self, user: UserKey, epoch: Epoch) -> bool:
        """Whether a plain release of this placement is as good as a handoff."""
        move = self._moves.get(user)
        return move is not None and move.epoch == epoch

    # Ends

    def moved(self, user: UserKey, epoch: Epoch, placement: Placement) -> None:
        """The placement under this epoch was taken over."""
        move = self._moves.get(user)
        if move is not None and move.epoch == epoch:
            self._end(move, UserMoved(placement, move.holder.node_id))

    def over(self, user: UserKey, epoch: Epoch) -> None:
        """The placement under this epoch is over, and was not taken over."""
        move = self._moves.get(user)
        if move is not None and move.epoch == epoch:
            why = "no other node could take the user; it is placed when somebody asks"
            self._end(move, Refused(Reason.NO_CAPACITY, why))

    def give_up(self, user: UserKey) -> None:
        """Nobody can take this user any more, who was not asked for yet."""
        move = self._moves[user]
        self._end(move, _nobody_takes(move.target))

    def fenced(self, node: Node) -> None:
        """The users of this node are placed on demand now, as after any death."""
        why = f"node {node.node_id} was lost; the user is placed anew when somebody asks"
        for move in [each for each in self._moves.values() if each.holder == node.incarnation]:
            self._end(move, Refused(Reason.MANAGER_UNAVAILABLE, why))

    def _end(self, move: _Move, answer: UserMoved | Refused) -> None:
        move.done = True
        if self._moves.get(move.user) is move:
            del self._moves[move.user]
        for peer in move.peers:
            self._turn.send(peer, answer)

    def tick(self) -> None:
        """Refuse the moves whose node took too long."""
        took = f"{self._config.move_wait_ms / 1000:g} s"
        while (deadline := self.next_deadline()) is not None and deadline <= self._turn.now_ms:
            move = self._deadlines.popleft()
            why = f"node {move.holder.node_id} did not let go of the user in {took}"
            self._end(move, Refused(Reason.MANAGER_UNAVAILABLE, why))

    def next_deadline(self) -> int | None:
        while self._deadlines and self._deadlines[0].done:
            self._deadlines.popleft()
        return self._deadlines[0].deadline_ms if self._deadlines else None


def _nobody_takes(target: NodeId) -> Refused:
    why = f"node {target} takes no more users" if target else "no other node takes users"
    return Refused(Reason.NO_CAPACITY, why)
