"""The `Registry` machine: which node holds which user's manager, and who may be one.

Pure: no I/O, clock, randomness or await. `handle(now_ms, command)` returns effects in the
order in which they must be performed; truth is in the placement store, whose outcomes
come back as commands. So a machine that starts again needs nothing but `Recover`.

It guarantees what `Nodes` and `Resolver` say. It does not make two managers impossible:
it hands out the next number, and the log compares it.
"""

from dataclasses import dataclass

from registry_service.core.commands import (
    AnnounceDrain,
    CloseEdgeSession,
    CloseNodeSession,
    Command,
    ConfirmPlacements,
    DescribeCluster,
    FindPlacement,
    FinishDial,
    FinishTransaction,
    OpenEdgeSession,
    OpenNodeSession,
    ReceiveBeat,
    Recover,
    ReleasePlacements,
    RenewLease,
    ReportDeath,
    ReportRefusal,
    ReportUnreachable,
    ResolveManagers,
    Tick,
)
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import (
    ClusterDescribed,
    EdgeWelcome,
    Effect,
    NodeStatus,
    PlacementFound,
    PlacementsConfirmed,
    PlacementsReleased,
    RefusalRecorded,
)
from registry_service.core.nodes import Nodes
from registry_service.core.pipeline import Answer, StorePipeline
from registry_service.core.resolver import Resolver
from registry_service.core.transactions import (
    PlacementRead,
    PlacementReleased,
    ReadPlacement,
    RecordRefusal,
    ReleasePlacement,
)
from registry_service.core.turn import Turn
from steward.model.keys import NodeIncarnation, Revision
from steward.model.placement import Placement


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """One node as the machine sees it. `up` says that its stream is open."""

    incarnation: NodeIncarnation
    up: bool
    draining: bool
    fencing: bool
    placements: int
    placing: int
    lease_until_ms: int


@dataclass(frozen=True, slots=True)
class RegistrySnapshot:
    """For gauges, simulation and tests: comparable, and without any live object."""

    nodes: tuple[NodeSnapshot, ...]
    edges: int
    revision: Revision
    waiting: int
    store_queue: int


class Registry:
    """The machine. One task owns it; it is never entered twice at a time."""

    def __init__(self, config: RegistryConfig) -> None:
        self._config = config
        self._turn = Turn()
        self._store = StorePipeline(self._turn, config.batch_operations, config.batches_in_flight)
        self._nodes = Nodes(config, self._turn, self._store)
        self._resolver = Resolver(config, self._turn, self._store, self._nodes)
        self._deadline: int | None = None

    def handle(self, now_ms: int, command: Command) -> list[Effect]:
        """Take one command. `now_ms` is of a clock that never goes back (boot time)."""
        turn = self._turn
        turn.begin(now_ms)
        if self._deadline is not None and now_ms - self._deadline > self._config.paused_after_ms:
            self._nodes.survive_pause()
        self._dispatch(command)
        if turn.more_room:
            turn.more_room = False
            self._resolver.wake_all()
        self._resolver.answer()
        self._store.flush()
        deadlines = [
            deadline
            for deadline in (self._nodes.next_deadline(), self._resolver.next_deadline())
            if deadline is not None
        ]
        self._deadline = max(now_ms, min(deadlines)) if deadlines else None
        return turn.finish()

    def next_deadline(self) -> int | None:
        """When a `Tick` is due, on the clock of `handle`; None: only when something happens."""
        return self._deadline

    def snapshot(self) -> RegistrySnapshot:
        nodes = tuple(
            NodeSnapshot(
                node.incarnation,
                node.session is not None,
                node.draining,
                node.fencing,
                node.placements,
                node.placing,
                node.lease_until_ms,
            )
            for node in self._nodes
        )
        return RegistrySnapshot(
            nodes,
            len(self._turn.edges),
            self._turn.revision,
            self._resolver.waiting,
            self._store.depth,
        )

    def _dispatch(self, command: Command) -> None:
        match command:
            case ResolveManagers():
                self._resolver.resolve(command)
            case FinishTransaction(transaction, outcome):
                self._store.finish(transaction, outcome)
            case Tick():
                self._nodes.tick()
                self._resolver.tick()
            case ReceiveBeat():
                self._nodes.beat(command)
            case RenewLease(peer, renewal):
                self._nodes.renew(peer, renewal)
            case ConfirmPlacements():
                self._confirm(command)
            case ReleasePlacements():
                self._release(command)
            case OpenNodeSession():
                self._nodes.open(command)
            case CloseNodeSession(peer, end):
                self._nodes.close(peer, end)
            case AnnounceDrain(peer):
                self._nodes.drain(peer)
            case OpenEdgeSession(peer, edge_id):
                self._turn.edges[peer] = edge_id
                self._turn.send(peer, EdgeWelcome(self._config.registry_id))
            case CloseEdgeSession(peer):
                self._turn.edges.pop(peer, None)
            case ReportUnreachable():
                self._nodes.report_unreachable(command)
            case ReportDeath():
                self._nodes.report_death(command)
            case ReportRefusal():
                self._report_refusal(command)
            case FinishDial(dial, outcome):
                self._nodes.finish_dial(dial, outcome)
            case FindPlacement():
                self._find(command)
            case DescribeCluster():
                self._describe(command)
            case Recover(view):
                self._turn.revision = view.revision
                self._nodes.recover(view)

    def _confirm(self, command: ConfirmPlacements) -> None:
        """Which of these users are on the asking node, by cache or by a linear read."""
        node = self._nodes.of_session(command.peer)
        if node is None:
            return
        found: list[Placement] = []
        missing = []
        for user in command.users:
            placement = self._resolver.cached(user)
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

    def _release(self, command: ReleasePlacements) -> None:
        """Compare and delete: a release of an old epoch, or by another node, removes nothing."""
        node = self._nodes.of_session(command.peer)
        if node is None:
            return
        left = len(command.releases)
        deleted = 0

        def told(answer: Answer) -> None:
            nonlocal left, deleted
            left -= 1
            operation, result = answer.operation, answer.result
            assert isinstance(operation, ReleasePlacement)
            assert isinstance(result, PlacementReleased)
            # Repeated and found empty: the earlier attempt, whose result was lost, did it.
            if result.deleted or (answer.repeated_since is not None and result.current is None):
                deleted += 1
                node.placements -= 1
                self._resolver.released(operation.user, operation.epoch)
            if left == 0:
                answer_now()

        def answer_now() -> None:
            self._turn.send(command.peer, PlacementsReleased(command.request_id, deleted))

        for release in command.releases:
            self._store.submit(
                ReleasePlacement(release.user, release.epoch, node.incarnation, release.cause),
                told,
            )
        if not command.releases:
            answer_now()

    def _report_refusal(self, command: ReportRefusal) -> None:
        node = self._nodes.of_session(command.peer)
        if node is not None:
            self._store.submit(
                RecordRefusal(
                    command.kind,
                    command.evidence,
                    command.user,
                    command.epoch,
                    node.incarnation,
                    command.traceparent,
                ),
                lambda _: None,
            )
            self._turn.emit(RefusalRecorded(command.kind, command.evidence))

    def _find(self, command: FindPlacement) -> None:
        def told(answer: Answer) -> None:
            result = answer.result
            assert isinstance(result, PlacementRead)
            self._turn.send(command.peer, PlacementFound(result.placement, result.alive))

        self._store.submit(ReadPlacement(command.user), told)

    def _describe(self, command: DescribeCluster) -> None:
        living = [node for node in self._nodes if not node.fencing]
        self._turn.send(
            command.peer,
            ClusterDescribed(
                tuple(NodeStatus(node.record, node.draining, node.managers) for node in living),
                self._turn.revision,
                sum(node.placements for node in living),
                len(self._turn.edges),
            ),
        )
