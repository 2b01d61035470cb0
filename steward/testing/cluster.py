"""A cluster in one process, on one event loop: all that decides is real, only wires are not.

Real are the registry's machine, driver and store, the nodes' hosts with their grants and
managers, the event log, and the agents in their own threads. Left out are gRPC, auth and
the edges' sockets: an `EdgeProbe` attaches and sends as an edge does, and records what
the stream of an edge would carry. For tests of ownership and isolation that need to look
inside; what crosses processes is tested with `LocalCluster`.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import orjson
from prometheus_client import CollectorRegistry

from agent_service.core.commands import AttachEdge, CancelRun, SubmitMessage
from agent_service.core.effects import AnswerAttached, Deliver
from agent_service.core.policy import AgentPolicy, ManagerPolicy
from agent_service.host.agent_loop import AgentLoop
from agent_service.host.constructions import ConstructionWatch
from agent_service.host.host import ManagerHost
from agent_service.host.ports import EdgeAnswer
from agent_service.log.port import EventLog
from agent_service.uplink.census import NodeCensus
from registry_service import convert as registry_convert
from registry_service.census.asking import fences_in, holdings_in
from registry_service.census.rounds import Census, CensusConfig
from registry_service.core import commands as ask
from registry_service.core import effects as tell
from registry_service.core.commands import DialOutcome, PeerId
from registry_service.core.config import RegistryConfig
from registry_service.core.registry import Registry
from registry_service.core.transactions import NodeClaim
from registry_service.driver import RegistryDriver
from registry_service.store.port import LedgerRow, PlacementStore
from registry_service.store.violation_table import ViolationRow
from steward.agent.loading import load_agents
from steward.errors import Reason, StewardError
from steward.model.census import SUM_MASK, Held, bucket_of
from steward.model.keys import EdgeId, Epoch, NodeId, NodeIncarnation, RunId, ThreadId, UserKey
from steward.model.placement import Placement
from steward.model.violations import Violation
from steward.rpc.census import HoldingsAnswers
from steward.runtime.clock import boot_ms
from steward.telemetry.catalog import AgentMetrics, RegistryMetrics
from steward.telemetry.tracing import Tracing
from steward.v1 import registry_service_pb2 as pb

DEADLINE_S = 10.0
NO_EPOCH = Epoch(0)
# Nobody beats here: what ends a node is only what a test does.
PATIENT = RegistryConfig(ttl_ms=600_000)


class _Dialer:
    """Every address answers: a node ends only when a test says so."""

    async def dial(self, address: str) -> DialOutcome:
        return DialOutcome.ACCEPTED


class _Call:
    """One question to the registry and its one answer."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[tell.Message] = asyncio.get_running_loop().create_future()

    def deliver(self, message: tell.Message) -> None:
        if not self.answer.done():
            self.answer.set_result(message)

    def end(self) -> None:
        if not self.answer.done():
            self.answer.set_exception(StewardError(Reason.STORE_UNAVAILABLE, "it has stopped"))


class _Nobody:
    """A peer to which nothing comes."""

    def deliver(self, message: tell.Message) -> None: ...

    def end(self) -> None: ...


class NodeUnderTest:
    """One node: the host's `RegistryPort`, and the registry's peer."""

    def __init__(
        self,
        name: str,
        cluster: "InProcessCluster",
        log: EventLog,
        agents: Sequence[str],
        policy: ManagerPolicy | None,
    ) -> None:
        self.name = NodeId(name)
        self.address = f"{name}:1"
        self.metrics = AgentMetrics(CollectorRegistry())
        self._driver = cluster.driver
        self._reported = cluster.record
        self._log = log
        self._telling: asyncio.Future[None] | None = None
        catalog = load_agents(agents)
        policy = policy or ManagerPolicy(
            tuple(AgentPolicy(spec.name, spec.overlap, spec.on_crash) for spec in catalog.agents)
        )
        self.host = ManagerHost(log, self, policy, self.metrics, cluster.tracing, self)
        self._agents = AgentLoop(catalog, self.host.verbs, self.metrics)
        self.host.run_on(self._agents)
        self._agents.start()
        self._constructions = ConstructionWatch(self.host.construction_refused)
        self._requests = itertools.count(1)
        self._confirming: dict[int, asyncio.Future[Placement | None]] = {}
        self._joined: asyncio.Future[NodeIncarnation] = asyncio.get_running_loop().create_future()
        self._peer = self._driver.connect(self)
        self._questions = cluster.census.questions
        self._census = NodeCensus(
            log, self.host.holdings.walk, lambda: self.incarnation.node_rev, self._tell_census
        )
        self._counting = asyncio.ensure_future(self._census.run())
        cluster.census.nodes.opened(self.name, self._peer, self.deliver)
        self._closed = partial(cluster.census.node_closed, self.name, self._peer)
        self.lost_sight_of: list[object] = []
        """Managers that a test took out of the host's table: they live on here."""
        self.pushes = True
        """False: grants that the registry pushes are lost, so that the node has to ask."""

    @property
    def incarnation(self) -> NodeIncarnation:
        return self._joined.result()

    async def join(self, nonce: str) -> None:
        claim = NodeClaim(self.name, "boot", nonce, self.address)
        self._driver.submit(ask.OpenNodeSession(self._peer, claim))
        await asyncio.wait_for(asyncio.shield(self._joined), DEADLINE_S)

    async def stop(self) -> None:
        self._constructions.close()
        self._closed()
        self._counting.cancel()
        if self._telling is not None:
            self._telling.cancel()
        telling = [self._telling] if self._telling is not None else []
        await asyncio.gather(self._counting, *telling, return_exceptions=True)
        await self.host.close()
        await self._agents.stop(0.2)

    def refused(self, kind: str) -> float:
        """How often this node has counted a refusal of this kind."""
        value = self.metrics.registry.get_sample_value("steward_refusals_total", {"kind": kind})
        return value or 0.0

    # The registry's peer

    def deliver(self, message: tell.Message) -> None:
        match message:
            case tell.NodeWelcome(node_rev):
                incarnation = NodeIncarnation(self.name, node_rev)
                self.host.joined(incarnation)
                self._joined.set_result(incarnation)
            case tell.PlacementsGranted(placements, activate) if self.pushes:
                self.host.granted(placements, activate)
            case tell.HandOffUsers(users, cause):
                self.host.hand_off(users, cause)
            case tell.EvictManagers(users):
                self.host.evict(users)
            case tell.ClusterMembers(node_ids):
                self.host.members(node_ids)
            case tell.AskLogHead():
                self._telling = asyncio.ensure_future(self._tell_log_head())
            case tell.AskHoldings():
                asked = registry_convert.holdings_question(message)
                self._census.asked(pb.HoldNodeSessionResponse(ask_holdings=asked))
            case tell.AskFences():
                fences = registry_convert.fences_question(message)
                self._census.asked(pb.HoldNodeSessionResponse(ask_fences=fences))
            case tell.PlacementsConfirmed(request_id, placements):
                found = self._confirming.pop(request_id)
                found.set_result(placements[0] if placements else None)
            case _:
                pass

    def _tell_census(self, answer: pb.HoldNodeSessionRequest) -> None:
        if answer.WhichOneof("body") == "holdings":
            self._questions.answered(self._peer, holdings_in(answer.holdings))
        else:
            self._questions.answered(self._peer, fences_in(answer.fences))

    async def _tell_log_head(self) -> None:
        summary = await self._log.describe()
        self.report_log_head(Epoch(summary.largest_fence))

    def end(self) -> None:
        """The registry has nothing more to say."""

    # What the host asks of the registry

    async def confirm(self, user: UserKey) -> Placement | None:
        number = next(self._requests)
        found: asyncio.Future[Placement | None] = asyncio.get_running_loop().create_future()
        self._confirming[number] = found
        self._driver.submit(ask.ConfirmPlacements(self._peer, number, (user,)))
        return await asyncio.wait_for(found, DEADLINE_S)

    def release(
        self,
        user: UserKey,
        epoch: Epoch,
        cause: str,
        handoff: bool = False,
        activate: bool = False,
    ) -> None:
        release = ask.Release(user, epoch, cause, handoff, activate)
        self._driver.submit(ask.ReleasePlacements(self._peer, next(self._requests), (release,)))

    def report_log_head(self, fence: Epoch) -> None:
        self._driver.submit(ask.ReportLogHead(self._peer, fence))

    def report(self, violation: Violation) -> None:
        """What a `ViolationReporter` does: count it, and have it recorded by a call."""
        self.metrics.refusals.labels(kind=violation.kind.value).inc()
        self._reported(violation, f"agent:{self.name}")


@dataclass(frozen=True, slots=True)
class Answered:
    """What a node answered to a command; `known` is its epoch when it refused."""

    answer: EdgeAnswer
    epoch: Epoch
    known: Epoch


class EdgeProbe:
    """An edge as nodes and registry see it; keeps everything that came for each user."""

    def __init__(self, name: str, cluster: "InProcessCluster") -> None:
        self.edge_id = EdgeId(f"{name}#1")
        self._cluster = cluster
        self._commands = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Answered]] = {}
        self.payloads: dict[UserKey, list[bytes]] = {}
        self.answers: dict[UserKey, list[Answered]] = {}
        self.lost: dict[UserKey, list[tuple[Epoch, Reason, Epoch]]] = {}
        self.placements: dict[UserKey, Placement] = {}
        self.taken: dict[UserKey, list[str]] = {}
        self.aborted = 0
        """How many nodes have ended their stream at once, since they were over."""
        # To which managers users are attached, by the nodes' answers.
        self.attached: dict[UserKey, Placement] = {}
        self._peer = cluster.driver.connect(_Nobody())
        self._questions = cluster.census.questions
        self._census = HoldingsAnswers(self._walk, self._tell_census)
        self._counting = asyncio.ensure_future(self._census.run())
        cluster.census.edges.opened(name, self._peer, self._asked)

    async def stop(self) -> None:
        self._counting.cancel()
        await asyncio.gather(self._counting, return_exceptions=True)

    def _asked(self, message: tell.Message) -> None:
        if isinstance(message, tell.AskHoldings):
            self._census.asked(registry_convert.holdings_question(message))

    def _walk(self) -> Iterator[Held]:
        for user, at in list(self.attached.items()):
            weight = hash((user, at.epoch, at.incarnation)) & SUM_MASK
            yield Held(bucket_of(user), weight, user, at.epoch, at.incarnation)

    def _tell_census(self, report: pb.ReportHoldings) -> None:
        self._questions.answered(self._peer, holdings_in(report))

    def events(self, user: UserKey) -> list[dict[str, Any]]:
        return [orjson.loads(payload) for payload in self.payloads.get(user, [])]

    def types(self, user: UserKey) -> list[str]:
        return [event["type"] for event in self.events(user)]

    async def attach(
        self, user: UserKey, *, placement: Placement | None = None, node: NodeId | None = None
    ) -> Answered:
        """Resolve and attach, as an edge does. With `placement` that one is believed instead.

        `node` sends the attach to another node than the placement says.
        """
        if placement is None:
            placement = await self._cluster.resolve(user)
        self.placements[user] = placement
        number = next(self._commands)
        attach = AttachEdge(self.edge_id, number, 0)
        answered = await self._command(placement, node, number, attach)
        if isinstance(answered.answer, AnswerAttached):
            self.attached[user] = placement
        return answered

    async def send(
        self,
        user: UserKey,
        id: str,
        text: str,
        *,
        agent: str = "",
        thread: str = "main",
        overlap: str = "",
    ) -> Answered:
        """Submit a message under the placement that the last attach used."""
        number = next(self._commands)
        trace = self._cluster.tracing.new_root()
        message = SubmitMessage(
            self.edge_id, number, id, orjson.dumps(text), ThreadId(thread), agent, overlap, trace
        )
        return await self._command(self.placements[user], None, number, message)

    async def cancel(self, user: UserKey, run_id: str = "", thread: str = "main") -> Answered:
        number = next(self._commands)
        cancel = CancelRun(self.edge_id, number, RunId(run_id), ThreadId(thread))
        return await self._command(self.placements[user], None, number, cancel)

    async def _command(
        self,
        placement: Placement,
        node: NodeId | None,
        number: int,
        command: AttachEdge | SubmitMessage | CancelRun,
    ) -> Answered:
        answered: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answered
        host = self._cluster.nodes[node or placement.node_id].host
        trace = self._cluster.tracing.new_root()
        host.command(placement.user, placement.epoch, command, trace)
        return await asyncio.wait_for(answered, DEADLINE_S)

    # What a node tells its edges

    def answer(self, user: UserKey, epoch: Epoch, answer: EdgeAnswer, known: Epoch) -> None:
        answered = Answered(answer, epoch, known)
        self.answers.setdefault(user, []).append(answered)
        waiting = self._waiting.pop(answer.command_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answered)

    def deliver(self, user: UserKey, epoch: Epoch, events: Deliver) -> None:
        self.payloads.setdefault(user, []).extend(events.payloads)

    def manager_lost(self, user: UserKey, epoch: Epoch, reason: Reason, known: Epoch) -> None:
        self.lost.setdefault(user, []).append((epoch, reason, known))
        if user in self.attached and self.attached[user].epoch <= epoch:
            del self.attached[user]

    def client_taken(self, user: UserKey, epoch: Epoch, client_id: str) -> None:
        self.taken.setdefault(user, []).append(client_id)

    def abort(self) -> None:
        self.aborted += 1


class InProcessCluster:
    """Use as an async context manager. `agents` are entrypoints (`file.py:name`)."""

    def __init__(
        self,
        store: PlacementStore,
        log: EventLog,
        agents: Sequence[str],
        *,
        nodes: int = 2,
        policy: ManagerPolicy | None = None,
        tracing: Tracing | None = None,
        config: RegistryConfig = PATIENT,
        clock: Callable[[], int] = boot_ms,
        census: CensusConfig | None = None,
    ) -> None:
        self.store = store
        self.log = log
        self.tracing = tracing or Tracing()
        self.registry_metrics = RegistryMetrics(CollectorRegistry())
        self.nodes: dict[NodeId, NodeUnderTest] = {}
        self.edges: list[EdgeProbe] = []
        self._agents = agents
        self._policy = policy
        self._count = nodes
        # Reports are stored in their order: when this one is, all are.
        self._last_report: asyncio.Future[int] | None = None
        self.driver = RegistryDriver(
            Registry(config), store, _Dialer(), self.registry_metrics, clock
        )
        # Taken when a test says so, unless it gives an interval.
        self.census = Census(
            self.driver, self.registry_metrics, census or CensusConfig(interval_ms=0)
        )
        self._counting: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        await self.driver.start()
        for number in range(self._count):
            await self.add_node(f"node-{number}")
        self._counting = asyncio.ensure_future(self.census.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._counting is not None:
            self._counting.cancel()
            await asyncio.gather(self._counting, return_exceptions=True)
        for edge in self.edges:
            await edge.stop()
        for node in self.nodes.values():
            await node.stop()
        await self.driver.stop()
        await self.log.close()

    async def add_node(self, name: str) -> NodeUnderTest:
        node = NodeUnderTest(name, self, self.log, self._agents, self._policy)
        self.nodes[node.name] = node
        for edge in self.edges:
            node.host.edge_opened(edge)
        await node.join(f"nonce of {name}")
        return node

    def edge(self, name: str) -> EdgeProbe:
        """Another edge, with a stream to every node."""
        edge = EdgeProbe(name, self)
        self.edges.append(edge)
        for node in self.nodes.values():
            node.host.edge_opened(edge)
        return edge

    def node_of(self, placement: Placement) -> NodeUnderTest:
        return self.nodes[placement.node_id]

    async def resolve(self, user: UserKey, min_epoch: Epoch = NO_EPOCH) -> Placement:
        """Where the user is, placing it if need be. Raises StewardError."""
        query = ask.UserQuery(user, min_epoch)
        resolved = await self._ask(lambda peer: ask.ResolveManagers(peer, 0, (query,)))
        assert isinstance(resolved, tell.ManagersResolved)
        result = resolved.results[0]
        if isinstance(result, tell.UserRefused):
            raise StewardError(result.reason, result.message)
        return result

    async def fence(self, node: NodeUnderTest) -> None:
        """Tell the registry that a node's process was reaped. The node itself does not hear it."""
        await self._ask(lambda peer: ask.ReportDeath(peer, node.name, 0, "reaped by a test"))

    async def move(self, user: UserKey, node: NodeUnderTest | None = None) -> Placement:
        """A planned move, to this node or any other. Raises StewardError."""
        node_id = node.name if node is not None else NodeId("")
        moved = await self._ask(lambda peer: ask.MoveUser(peer, user, node_id))
        if not isinstance(moved, tell.UserMoved):
            assert isinstance(moved, tell.Refused), moved
            raise StewardError(moved.reason, moved.message)
        return moved.placement

    async def drain(self, node: NodeUnderTest) -> None:
        """Have the registry move every user away from a node; returns when it is recorded."""
        await self._ask(lambda peer: ask.DrainNode(peer, node.name))

    async def evict(self, user: UserKey, cause: str = "by a test") -> None:
        """Have the registry evict a user; returns when its placement is over."""
        await self._ask(lambda peer: ask.EvictUser(peer, user, cause))

    async def ledger(self, kind: str = "", user: UserKey | None = None) -> list[LedgerRow]:
        """Rows of the ledger, oldest first, after what was submitted until now is stored."""
        await self._ask(lambda peer: ask.FindPlacement(peer, UserKey("nobody", "nobody")))
        rows = await self.store.ledger(user, 10_000)
        return [row for row in reversed(rows) if kind in ("", row.kind)]

    async def violations(self) -> list[ViolationRow]:
        """What is recorded as a refusal or breach, oldest first, of all submitted until now."""
        await self._ask(lambda peer: ask.FindPlacement(peer, UserKey("nobody", "nobody")))
        if self._last_report is not None:
            await asyncio.wait_for(asyncio.shield(self._last_report), DEADLINE_S)
        return await self.store.violations(0, 10_000)

    def record(self, violation: Violation, reporter: str) -> None:
        """What the registry does with a report that came by a call."""
        self._last_report = self.driver.recorder.record([violation], reporter)

    async def _ask(self, command: Callable[[PeerId], ask.Command]) -> tell.Message:
        call = _Call()
        peer = self.driver.connect(call)
        try:
            self.driver.submit(command(peer))
            return await asyncio.wait_for(call.answer, DEADLINE_S)
        finally:
            self.driver.disconnect(peer)
