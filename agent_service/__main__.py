"""`python -m agent_service`: one agent node. The only module that knows all the others."""

import asyncio
import logging
import os
import sys
from importlib.metadata import version
from typing import Any, NoReturn

import grpc
from prometheus_client import CollectorRegistry

from agent_service.core.policy import AgentPolicy, ManagerPolicy
from agent_service.host.agent_loop import AgentLoop
from agent_service.host.constructions import ConstructionWatch
from agent_service.host.host import ManagerHost
from agent_service.log.remote import RemoteLog
from agent_service.log.sqlite import SqliteLog
from agent_service.server import ALLOWED, AgentServicer
from agent_service.settings import AgentSettings
from agent_service.uplink.registry import NodeSession, boot_id, new_nonce
from steward.agent.loading import AgentCatalog, load_agents
from steward.config.settings import SettingsError, load
from steward.model.keys import NodeId, NodeIncarnation
from steward.rpc.factory import make_server
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials, RoleVerifier
from steward.runtime.service import EnvironmentUnusable, run
from steward.telemetry.catalog import AgentMetrics, LogMetrics
from steward.telemetry.lag import LagProbe
from steward.telemetry.logs import configure
from steward.telemetry.otlp import make_tracing
from steward.v1 import registry_service_pb2 as pb
from steward.v1.agent_service_pb2_grpc import add_AgentServiceServicer_to_server

_log = logging.getLogger(__name__)

FLUSH_S = 0.5
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
        self._tracing = make_tracing("agent", settings.id, settings)
        self._log = self._make_log(credentials)
        await self._log.open()
        policy = ManagerPolicy(
            tuple(AgentPolicy(spec.name, spec.overlap) for spec in self.catalog.agents),
            settings.max_waiting_runs,
            settings.messages_per_minute,
        )
        server = make_server(RoleVerifier(key, settings.cluster), ALLOWED)
        port = server.add_insecure_port(f"{settings.host}:{settings.grpc_port}")
        if port == 0:
            raise EnvironmentUnusable(f"gRPC port {settings.grpc_port} can't be used")
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
        self._lag = LagProbe(instruments.loop_lag)
        self._session = NodeSession(
            settings.registry,
            credentials,
            hello,
            joined=self._joined,
            granted=lambda placements: self._host.granted(placements),
            beat=self._beat,
        )
        self._host = ManagerHost(self._log, self._session, policy, instruments, self._tracing)
        self._agents = AgentLoop(self.catalog, self._host.verbs, instruments)
        self._host.run_on(self._agents)
        self._host.passivate_after(settings.passivate_after_ms)
        self._servicer = AgentServicer(self._host, self._log, settings.cluster)
        add_AgentServiceServicer_to_server(self._servicer, server)
        self._server: grpc.aio.Server | None = server
        self._constructions = ConstructionWatch(self._host.construction_refused)
        self._agents.start()
        await server.start()
        self._lag.start()
        self._holding = asyncio.ensure_future(self._session.run())

    def unready(self) -> str | None:
        if self._servicer is None or self._servicer.incarnation is None:
            return "not joined to the registry"
        if not self._log_reachable():
            return "no connection to the log"
        return None

    async def failed(self) -> None:
        """Ends when this incarnation is over, or the log failed for good."""
        ends: set[asyncio.Future[Any]] = {self._host.failed, self._session.fenced, self._holding}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if self._session.fenced.done():
            _log.error("this incarnation is over", extra={"cause": self._session.fenced.result()})
        elif self._holding.done():
            self._holding.result()

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        settings = self.settings
        self._constructions.close()
        over = self._session.fenced.done() or self._host.failed.done()
        if not over:
            self._session.announce_drain()
            await self._host.drain(settings.drain_runs_ms / 1000, settings.drain_appends_ms / 1000)
            await self._session.flush(FLUSH_S)
        assert self._servicer is not None
        self._servicer.close_streams()
        await self._host.close()
        await server.stop(0.2)
        self._holding.cancel()
        await asyncio.gather(self._holding, return_exceptions=True)
        await self._agents.stop(0.2)
        self._lag.stop()
        if not over:
            await self._log.close()
        self._tracing.close()

    def _make_log(self, credentials: RoleCredentials) -> RemoteLog | SqliteLog:
        settings = self.settings
        if settings.log:
            return RemoteLog(settings.log, settings.cluster, NodeId(settings.id), credentials)
        return SqliteLog(settings.data, LogMetrics(self.metrics))

    def _log_reachable(self) -> bool:
        return not isinstance(self._log, RemoteLog) or self._log.connected

    def _joined(self, incarnation: NodeIncarnation) -> None:
        self._host.joined(incarnation)
        assert self._servicer is not None
        self._servicer.incarnation = incarnation

    def _beat(self) -> pb.NodeBeat:
        return pb.NodeBeat(
            loop_lag_ms=int(self._lag.take_worst() * 1000),
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
