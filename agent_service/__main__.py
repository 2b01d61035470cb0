"""`python -m agent_service`: one agent node. The only module that knows all the others."""

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

import grpc
from prometheus_client import CollectorRegistry

from agent_service.core.policy import AgentPolicy, ManagerPolicy
from agent_service.edge_streams import EdgeStreams
from agent_service.framed import PREFACE, FramedEdges
from agent_service.host.agent_loop import AgentLoop
from agent_service.host.constructions import ConstructionWatch
from agent_service.host.host import ManagerHost
from agent_service.host.log_head import LogHead
from agent_service.host.orphans import OrphanScan
from agent_service.log.remote import RemoteLog
from agent_service.log.sqlite import SqliteLog
from agent_service.server import ALLOWED, AgentServicer
from agent_service.settings import AgentSettings
from agent_service.uplink.census import NodeCensus
from agent_service.uplink.registry import NodeSession, boot_id, new_nonce
from steward.agent.loading import AgentCatalog, load_agents
from steward.config.settings import SettingsError, load
from steward.model.keys import NodeId, NodeIncarnation
from steward.rpc.factory import make_server
from steward.rpc.front import LOOPBACK, Front
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials, RoleVerifier
from steward.rpc.violations import ViolationReporter
from steward.runtime.service import EnvironmentUnusable, run
from steward.telemetry.catalog import AgentMetrics, LogMetrics
from steward.telemetry.logs import configure
from steward.telemetry.otlp import make_tracing
from steward.telemetry.probes import ProcessProbes
from steward.v1 import registry_service_pb2 as pb
from steward.v1.agent_service_pb2_grpc import add_AgentServiceServicer_to_server

_log = logging.getLogger(__name__)

FLUSH_S = 0.5
STREAMS_S = 0.2
BUNDLED_AGENT = "agent_service.agents.demo:demo"


class AgentNode:
    """Composes a node and drives its life."""

    def __init__(self, settings: AgentSettings, catalog: AgentCatalog) -> None:
        self.settings = settings
        self.catalog = catalog
        self.metrics = CollectorRegistry()
        self._servicer: AgentServicer | None = None

    async def start(self) -> None:
        settings = self.settings
        key = load_or_create_key(settings.data, CONTROL_KEY)
        credentials = RoleCredentials(key, Role.AGENT, settings.cluster, settings.id)
        instruments = AgentMetrics(self.metrics)
        self._tracing = make_tracing("agent", settings.id, settings, content=settings.trace_content)
        self._log = self._make_log(credentials)
        await self._log.open()
        policy = ManagerPolicy(
            tuple(
                AgentPolicy(spec.name, spec.overlap, spec.on_crash) for spec in self.catalog.agents
            ),
            settings.max_waiting_runs,
            settings.messages_per_minute,
        )
        verifier = RoleVerifier(key, settings.cluster)
        server = make_server(verifier, ALLOWED)
        grpc_port = server.add_insecure_port(f"{LOOPBACK}:0")
        self._front = Front(PREFACE, lambda: self._framed.accept(), grpc_port)
        try:
            port = await self._front.open(settings.host, settings.grpc_port, serving=False)
        except OSError:
            raise EnvironmentUnusable(f"gRPC port {settings.grpc_port} can't be used") from None
        hello = pb.NodeHello(
            cluster=settings.cluster,
            node_id=settings.id,
            boot_id=boot_id(),
            nonce=new_nonce(),
            address=f"{settings.advertise or settings.host}:{port}",
            zone=settings.zone,
            capacity=settings.capacity,
            version=version("steward"),
            pid=os.getpid(),
        )
        self._probes = ProcessProbes(instruments)
        self._session = NodeSession(
            settings.registry,
            credentials,
            hello,
            joined=self._joined,
            granted=lambda placements, activate: self._host.granted(placements, activate),
            hand_off=lambda users, cause: self._host.hand_off(users, cause),
            evict=lambda users: self._host.evict(users),
            members=self._members,
            asked_log_head=lambda: self._log_head.asked(),
            lease_uncertain=lambda tenants: self._host.lease_uncertain(tenants),
            lease_certain=lambda: self._host.lease_certain(),
            beat=self._beat,
            census=lambda asked: self._census.asked(asked),
        )
        self._violations = ViolationReporter(
            settings.registry, credentials, instruments, tracing=self._tracing
        )
        self._host = ManagerHost(
            self._log,
            self._session,
            policy,
            instruments,
            self._tracing,
            self._violations,
            handoff_ms=settings.drain_runs_ms,
        )
        self._session.fenced.add_done_callback(lambda fenced: self._host.fence(fenced.result()))
        self._agents = AgentLoop(self.catalog, self._host.verbs, instruments)
        self._host.run_on(self._agents)
        self._host.passivate_after(settings.passivate_after_ms)
        self._streams = EdgeStreams(self._host, settings.cluster, instruments)
        self._framed = FramedEdges(self._streams, verifier)
        self._servicer = AgentServicer(self._host, self._log, self._streams)
        add_AgentServiceServicer_to_server(self._servicer, server)
        self._server: grpc.aio.Server | None = server
        self._constructions = ConstructionWatch(self._host.construction_refused)
        self._agents.start()
        await server.start()
        await self._front.serve()
        self._probes.start()
        self._orphans = OrphanScan(
            self._log, NodeId(settings.id), self._host.owned, self._session.adopt
        )
        self._log_head = LogHead(self._log, self._session.report_log_head)
        self._census = NodeCensus(
            self._log,
            self._host.holdings.walk,
            lambda: self._session.node_rev,
            self._session.answer_census,
        )
        self._holding = asyncio.ensure_future(self._session.run())
        self._tasks = [
            self._holding,
            asyncio.ensure_future(self._orphans.run()),
            asyncio.ensure_future(self._log_head.run()),
            asyncio.ensure_future(self._census.run()),
        ]

    def unready(self) -> str | None:
        if self._servicer is None:
            return "it is starting"
        if (why := self._session.unready()) is not None:
            return why
        if not self._log_reachable():
            return "no connection to the log"
        return None

    async def failed(self) -> None:
        """Ends when this incarnation is over, or the log failed for good."""
        ends: set[asyncio.Future[Any]] = {self._host.failed, self._host.fenced, *self._tasks}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in self._tasks:
            if task.done() and not self._session.fenced.done():
                task.result()

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        self._constructions.close()
        over = self._host.fenced.done() or self._host.failed.done()
        if over:
            # Silent already, also towards the registry; agents' code may do nothing but end.
            self._holding.cancel()
            await self._agents.stop(0)
        else:
            await self._let_go()
        self._front.stop_listening()
        self._streams.end()
        await self._host.close()
        within_s = 0 if over else STREAMS_S
        await asyncio.gather(self._framed.close(within_s), server.stop(within_s))
        await self._front.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._agents.stop(0.2)
        self._probes.stop()
        if not over:
            await self._log.close()
        await self._violations.close()
        self._tracing.close()

    async def _let_go(self) -> None:
        """The drain: other nodes take over, or the next start does. Edges' streams end after it."""
        settings = self.settings
        self._session.announce_drain()
        await self._host.drain(
            settings.drain_stop_ms / 1000,
            settings.drain_appends_ms / 1000,
            settings.drain_runs_ms / 1000,
        )
        await self._session.flush(FLUSH_S)

    def _make_log(self, credentials: RoleCredentials) -> RemoteLog | SqliteLog:
        settings = self.settings
        if settings.log:
            return RemoteLog(settings.log, settings.cluster, NodeId(settings.id), credentials)
        return SqliteLog(settings.data, LogMetrics(self.metrics))

    def _log_reachable(self) -> bool:
        return not isinstance(self._log, RemoteLog) or self._log.connected

    def _joined(self, incarnation: NodeIncarnation) -> None:
        self._host.joined(incarnation, self._session.lease_ms)
        self._streams.incarnation = incarnation

    def _members(self, node_ids: Sequence[NodeId]) -> None:
        self._host.members(node_ids)
        self._orphans.members(node_ids)

    def _beat(self) -> pb.NodeBeat:
        return pb.NodeBeat(
            loop_lag_ms=int(self._probes.take_worst() * 1000),
            managers=self._host.managers,
            open_runs=self._host.open_runs,
            log_reachable=self._log_reachable(),
        )


def main() -> NoReturn:
    """Read settings and agents, then run until stopped. Exit code 2 for what can't be used."""
    try:
        settings = load(AgentSettings, sys.argv[1:], os.environ)
        if not settings.registry:
            raise SettingsError("--registry (STEWARD_AGENT_REGISTRY) is needed: host:port")
        catalog = load_agents(settings.entrypoints or (BUNDLED_AGENT,))
    except SettingsError as error:
        print(f"steward: {error}", file=sys.stderr)
        sys.exit(2)
    configure(settings, "agent")
    run(lambda: AgentNode(settings, catalog), settings)


if __name__ == "__main__":
    main()
