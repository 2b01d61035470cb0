"""What a node says about its own placements: which are mine, and these I give up.

Guarantees: compare and delete. A release, or a handoff, of an old epoch or by another node
than the holder removes nothing. A user with open runs whom no node could take at the handoff is an
orphan from then on, and waits for no edge. A release that names a placement which the node cannot
ever have had (another node's, under that epoch or a higher one) is recorded as `foreign_release`;
one that is only late is nothing special.
"""

from collections.abc import Callable

from registry_service.core.commands import ConfirmPlacements, Release, ReleasePlacements
from registry_service.core.effects import PlacementsConfirmed, PlacementsReleased
from registry_service.core.moves import Moves
from registry_service.core.node import Node, NodeTable
from registry_service.core.orphans import Orphans
from registry_service.core.pipeline import Answer, StorePipeline
from registry_service.core.placements import Placements
from registry_service.core.refusals import Refusals
from registry_service.core.resolver import Resolver
from registry_service.core.transactions import (
    PlacementRead,
    PlacementReleased,
    ReadPlacement,
    ReleasePlacement,
)
from registry_service.core.turn import Turn
from steward.model.keys import Epoch, UserKey
from steward.model.placement import Placement
from steward.model.violations import Violation, ViolationKind


class Releases:
    """Confirms and releases. `listeners` hear which placements are over: (user, epoch)."""

    def __init__(
        self,
        turn: Turn,
        store: StorePipeline,
        nodes: NodeTable,
        placements: Placements,
        resolver: Resolver,
        moves: Moves,
        orphans: Orphans,
        refusals: Refusals,
    ) -> None:
        self._turn = turn
        self._store = store
        self._nodes = nodes
        self._placements = placements
        self._resolver = resolver
        self._moves = moves
        self._orphans = orphans
        self._refusals = refusals
        self.listeners: list[Callable[[UserKey, Epoch], None]] = [moves.let_go]

    def confirm(self, command: ConfirmPlacements) -> None:
        """Which of these users are on the asking node, by cache or by a linear read."""
        node = self._nodes.of_session(command.peer)
        if node is None:
            return
        found: list[Placement] = []
        missing = []
        for user in command.users:
            placement = self._placements.living(user)
            if placement is None:
                missing.append(user)
            elif placement.incarnation == node.incarnation:
                found.append(placement)
        left = len(missing)

        def told(answer: Answer) -> None:
            nonlocal left
            left -= 1
            result = answer.result
            assert isinstance(result, PlacementRead)
            if result.placement is not None and result.placement.incarnation == node.incarnation:
                found.append(result.placement)
            if left == 0:
                answer_now()

        def answer_now() -> None:
            self._turn.send(command.peer, PlacementsConfirmed(command.request_id, tuple(found)))

        for user in missing:
            self._store.submit(ReadPlacement(user), told)
        if not missing:
            answer_now()

    def release(self, command: ReleasePlacements) -> None:
        """Take what a node gives up; a handoff is given to the next node in the same step."""
        node = self._nodes.of_session(command.peer)
        if node is None:
            return
        left = len(command.releases)
        deleted = 0

        def told(release: Release, answer: Answer) -> None:
            nonlocal left, deleted
            left -= 1
            deleted += self._told(node, release, answer)
            if left == 0:
                answer_now()

        def answer_now() -> None:
            self._turn.send(command.peer, PlacementsReleased(command.request_id, deleted))

        for release in command.releases:
            self._submit(node, release, told)
        if not command.releases:
            answer_now()

    def remove(self, placement: Placement, cause: str, then: Callable[[], None]) -> None:
        """Delete a placement that its node did not release: it is dead, or silent."""
        release = Release(placement.user, placement.epoch, cause)
        holder = placement.incarnation

        def told(answer: Answer) -> None:
            node = self._nodes.get(holder)
            self._told(node, release, answer)
            then()

        operation = ReleasePlacement(placement.user, placement.epoch, holder, cause)
        self._store.submit(operation, told)

    def _submit(
        self, node: Node, release: Release, told: Callable[[Release, Answer], None]
    ) -> None:
        user, epoch = release.user, release.epoch
        if release.handoff or self._moves.wants(user, epoch):
            self._moves.take_over(node, release, lambda answer: told(release, answer))
        else:
            operation = ReleasePlacement(user, epoch, node.incarnation, release.cause)
            self._store.submit(operation, lambda answer: told(release, answer))

    def _told(self, node: Node | None, release: Release, answer: Answer) -> bool:
        """Whether the placement is not this node's any more because of this release."""
        user, epoch = release.user, release.epoch
        taken = self._moves.taken_over(answer)
        over = True
        if taken is not None:
            gone = True
            if node is not None:
                node.placements -= 1
            self._moves.finish(release, taken)
        else:
            result = answer.result
            assert isinstance(result, PlacementReleased)
            # Repeated and found empty: the earlier attempt, whose result was lost, did it.
            repeated = answer.repeated_since is not None
            gone = result.deleted or (repeated and result.current is None)
            if gone:
                if node is not None:
                    node.placements -= 1
                self._placements.end(user, epoch)
                self._resolver.released(user)
            elif result.current is not None:
                over = result.current.epoch > epoch
                if node is not None:
                    self._check(node, release, result.current)
        if over:
            for listener in self.listeners:
                listener(user, epoch)
        if gone and taken is None and release.activate:
            # Handed off when nobody could take it: its runs must not wait until a node names it.
            self._orphans.adopt((user,))
        return gone

    def _check(self, node: Node, release: Release, current: Placement) -> None:
        if release.epoch < current.epoch:
            return  # Late: the user was placed again since.
        evidence = (
            f"released epoch {release.epoch} of a user who is on {current.node_id}/"
            f"{current.node_rev} under {current.epoch}"
        )
        self._refusals.record(
            Violation(
                ViolationKind.FOREIGN_RELEASE,
                evidence,
                user=release.user,
                epoch=release.epoch,
                node=node.incarnation,
            ),
            reporter=f"agent:{node.node_id}",
        )
