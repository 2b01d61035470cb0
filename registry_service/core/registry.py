"""The `Registry` machine: which node holds which user's manager, and who may be one.

Pure: no I/O, clock, randomness or await. `handle(now_ms, command)` returns effects in the
order in which they must be performed; truth is in the placement store, whose outcomes
come back as commands. So a machine that starts again needs nothing but `Recover`.

It guarantees what its parts say: `Joining`, `Observation`, `Fencing`, `Holds`, `LogFloor`,
`Resolver`, `Moves`, `Evictions`, `Releases`, `Orphans`. It does not make two managers
impossible: it hands out the next number, and the log compares it.
"""

from dataclasses import dataclass

from registry_service.core.cluster import Cluster
from registry_service.core.commands import (
    AdoptUsers,
    AnnounceDrain,
    CloseEdgeSession,
    CloseNodeSession,
    Command,
    ConfirmPlacements,
    DescribeCluster,
    DrainNode,
    EvictUser,
    FenceNodeByOperator,
    FindPlacement,
    FinishDial,
    FinishTransaction,
    MoveUser,
    OpenEdgeSession,
    OpenNodeSession,
    PeerId,
    ReceiveBeat,
    Recover,
    ReleasePlacements,
    RenewLease,
    ReportDeath,
    ReportLogHead,
    ReportUnreachable,
    ResolveManagers,
    Tick,
)
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import (
    ClusterDescribed,
    EdgeWelcome,
    Effect,
    NodeFenced,
    PlacementFound,
)
from registry_service.core.evictions import Evictions
from registry_service.core.evidence import Observation
from registry_service.core.fencing import Fencing
from registry_service.core.floor import LogFloor
from registry_service.core.holds import Holds
from registry_service.core.joining import Joining
from registry_service.core.moves import Moves
from registry_service.core.node import Node, NodeTable
from registry_service.core.orphans import Orphans
from registry_service.core.pipeline import Answer, StorePipeline
from registry_service.core.placements import Placements
from registry_service.core.refusals import Refusals
from registry_service.core.releases import Releases
from registry_service.core.resolver import Resolver
from registry_service.core.transactions import PlacementRead, ReadPlacement, StoreView
from registry_service.core.turn import Turn
from steward.model.keys import EdgeId, NodeIncarnation, Revision


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
        self._turn = turn = Turn()
        self._store = store = StorePipeline(turn, config.batch_operations, config.batches_in_flight)
        self._nodes = nodes = NodeTable(config, turn)
        self._placements = Placements(config, turn, nodes)
        self._cluster = Cluster(turn, nodes)
        self._refusals = Refusals(f"registry:{config.registry_id}", turn, store)
        self._holds = Holds(config, turn, store)
        self._fencing = Fencing(turn, store, nodes, self._holds)
        self._observation = Observation(config, turn, nodes, self._fencing, self._holds)
        self._joining = Joining(
            config, turn, store, nodes, self._fencing, self._observation, self._refusals
        )
        self._floor = LogFloor(config, turn, store, nodes, self._fencing, self._refusals)
        self._resolver = Resolver(config, turn, store, nodes, self._placements, self._fencing)
        self._moves = Moves(config, turn, store, nodes, self._placements, self._resolver)
        self._orphans = Orphans(config, turn, nodes, self._resolver)
        self._releases = Releases(
            turn,
            store,
            nodes,
            self._placements,
            self._resolver,
            self._moves,
            self._orphans,
            self._refusals,
        )
        self._evictions = Evictions(config, turn, store, nodes, self._releases.remove)
        self._fencing.listeners += [self._moves.fenced, self._evictions.fenced]
        self._releases.listeners.append(self._evictions.released)
        self._moves.listeners.append(self._evictions.moved)
        self._new_edge: PeerId | None = None
        self._deadline: int | None = None

    def handle(self, now_ms: int, command: Command) -> list[Effect]:
        """Take one command. `now_ms` is of a clock that never goes back (boot time)."""
        turn = self._turn
        turn.begin(now_ms)
        self._nodes.look_anew()
        if self._deadline is not None and now_ms - self._deadline > self._config.paused_after_ms:
            self._observation.survive_pause()
        self._dispatch(command)
        self._nodes.look_anew()
        self._finish_welcomes()
        if turn.more_room:
            turn.more_room = False
            self._resolver.wake_all()
            self._moves.ask_all()
        self._resolver.answer()
        self._orphans.go_on()
        self._store.flush()
        parts = (self._observation, self._resolver, self._moves, self._evictions, self._holds)
        deadlines = [part.next_deadline() for part in (*parts, self._floor)]
        known = [deadline for deadline in deadlines if deadline is not None]
        self._deadline = max(now_ms, min(known)) if known else None
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
                self._tick()
            case ReceiveBeat():
                self._observation.beat(command)
            case RenewLease(peer, renewal):
                self._observation.renew(peer, renewal)
            case ConfirmPlacements():
                self._releases.confirm(command)
            case ReleasePlacements():
                self._releases.release(command)
            case OpenNodeSession():
                self._joining.open(command)
            case CloseNodeSession(peer, end):
                self._observation.close(peer, end)
            case AnnounceDrain(peer):
                self._moves.announce(peer)
            case ReportLogHead():
                self._floor.report(command)
            case AdoptUsers(peer, users):
                if self._nodes.of_session(peer) is not None:
                    self._orphans.adopt(users)
            case OpenEdgeSession(peer, edge_id):
                self._open_edge(peer, edge_id)
            case CloseEdgeSession(peer):
                self._turn.edges.pop(peer, None)
                self._placements.close_edge(peer)
            case ReportUnreachable():
                joining = self._joining.in_progress(command.incarnation.node_id)
                self._observation.report_unreachable(command, joining)
            case ReportDeath():
                self._observation.report_death(command)
            case DrainNode():
                self._moves.drain(command)
            case FenceNodeByOperator():
                self._fencing.by_operator(command)
            case MoveUser():
                self._moves.move(command)
            case EvictUser():
                self._evictions.evict(command)
            case FinishDial(dial, outcome):
                self._observation.finish_dial(dial, outcome)
            case FindPlacement():
                self._find(command)
            case DescribeCluster():
                self._describe(command)
            case Recover(view):
                self._recover(view)

    def _recover(self, view: StoreView) -> None:
        self._turn.revision = view.revision
        self._store.recover(view)
        self._floor.recover(view)
        self._holds.recover(view.holds)
        self._observation.recover(view)

    def _tick(self) -> None:
        self._observation.tick()
        self._resolver.tick()
        self._moves.tick()
        self._evictions.tick()
        self._holds.tick()

    def _open_edge(self, peer: PeerId, edge_id: EdgeId) -> None:
        self._turn.edges[peer] = edge_id
        self._placements.open_edge(peer)
        self._turn.send(peer, EdgeWelcome(self._config.registry_id))
        for incarnation in self._holds.incarnations():
            # It may have been away when all were told, or this process has started since.
            self._turn.send(peer, NodeFenced(incarnation, "fenced before"))
        self._new_edge = peer

    def _finish_welcomes(self) -> None:
        """What newcomers are told after their welcome, and all when the cluster changed."""
        welcomed, self._joining.welcomed = self._joining.welcomed, []
        new_edge, self._new_edge = self._new_edge, None
        self._cluster.announce(welcomed, new_edge)
        self._floor.ask()
        for node in welcomed:
            self._moves.empty(node)
            self._evictions.resumed(node)

    def _find(self, command: FindPlacement) -> None:
        def told(answer: Answer) -> None:
            result = answer.result
            assert isinstance(result, PlacementRead)
            edges = self._placements.edges(command.user) if result.placement is not None else ()
            found = PlacementFound(result.placement, result.alive, edges)
            self._turn.send(command.peer, found)

        self._store.submit(ReadPlacement(command.user), told)

    def _describe(self, command: DescribeCluster) -> None:
        living: list[Node] = [node for node in self._nodes if not node.fencing]
        self._turn.send(
            command.peer,
            ClusterDescribed(
                tuple(node.status() for node in living),
                self._turn.revision,
                sum(node.placements for node in living),
                len(self._turn.edges),
            ),
        )
