"""`EdgeService`: one edge process, from its settings to its last closed socket.

Guaranteed: `stop` sees every connection off within 5 s: at first newcomers are told 503, then
nothing listens any more, before the first of those that were sent away comes back. Peers
that are away at the start are not an error: the edge is alive, not ready, and says why.
"""

import asyncio
import socket
from importlib.metadata import version

from aiohttp import web
from prometheus_client import CollectorRegistry

from edge.core.server_messages import Limits
from edge.host.hub import Hub, HubSettings
from edge.server.app import check_entry, doors_for, make_app, make_runner
from edge.server.connect import Connect
from edge.server.credentials import Doors
from edge.server.door import Doorway
from edge.settings import STATIC, EdgeSettings
from edge.uplink.auth import GrpcAuth
from edge.uplink.nodes import WireNodes
from edge.uplink.registry import GrpcRegistry
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.rpc.violations import ViolationReporter
from steward.runtime.heap import settle
from steward.runtime.service import EnvironmentUnusable
from steward.telemetry.catalog import EdgeMetrics
from steward.telemetry.otlp import make_tracing
from steward.telemetry.probes import ProcessProbes

LAST_CALL_S = 0.2
"""How long a stopping edge still answers; less than anybody is told to stay away."""


class EdgeService:
    """`steward.runtime.service.Service` for the edge. `port` is the bound one after `start`."""

    def __init__(self, settings: EdgeSettings) -> None:
        self.metrics = CollectorRegistry()
        self.port = settings.port
        self._settings = settings
        self._metrics = EdgeMetrics(self.metrics)
        self._id = settings.id or f"edge-{socket.gethostname()}"
        self._doors = Doors(())
        self._hub: Hub | None = None
        self._site: web.TCPSite | None = None
        self._stopped = False

    async def start(self) -> None:
        """Open the public port and begin to look for the peers."""
        settings = self._settings
        key = load_or_create_key(settings.data, CONTROL_KEY)
        credentials = RoleCredentials(key, Role.EDGE, settings.cluster, self._id)
        self._tracing = make_tracing("edge", self._id, settings)
        hub = Hub(hub_settings(settings), self._metrics, self._tracing)
        release = version("steward")
        self._registry = GrpcRegistry(
            settings.registry, credentials, settings.cluster, self._id, release, hub
        )
        self._auth = GrpcAuth(settings.auth, credentials, settings.cluster, self._id, hub)
        self._nodes = WireNodes(credentials, settings.cluster, self._id, release, hub)
        self._metrics.waiting_commands.set_function(lambda: self._nodes.waiting)
        self._violations = ViolationReporter(
            settings.registry, credentials, self._metrics, tracing=self._tracing
        )
        hub.registry, hub.auth, hub.nodes = self._registry, self._auth, self._nodes
        hub.violations = self._violations
        self._hub = hub
        self._probes = ProcessProbes(self._metrics)
        self._probes.start()
        hub.start()
        connect = Connect(hub, self._metrics)
        self._doorway = Doorway(connect, lambda asked: check_entry(asked, self._doors, hub))
        app = make_app(
            hub,
            connect,
            lambda: self._doors,
            self.unready,
            STATIC,
            settings.max_message_bytes,
        )
        self._runner = make_runner(app, self._doorway)
        await self._runner.setup()
        await self._listen()
        settle()

    async def _listen(self) -> None:
        settings = self._settings
        site = web.TCPSite(
            self._runner, settings.host, settings.port, backlog=1024, reuse_port=True
        )
        try:
            await site.start()
        except OSError as error:
            await self.stop()
            raise EnvironmentUnusable(
                f"port {settings.host}:{settings.port} can't be used: {error.strerror}"
            ) from None
        self._site = site
        self.port = int(self._runner.addresses[0][1])
        self._doors = doors_for(
            settings.public_url,
            self.port,
            settings.allowed_origins,
            loopback=settings.loopback or not settings.public_url,
        )

    def unready(self) -> str | None:
        """Why this edge can't serve right now."""
        hub = self._hub
        if hub is None:
            return "starting"
        if hub.draining:
            return "stopping"
        if not hub.registry.connected:
            return "no connection to the registry"
        if not hub.auth.connected:
            return "no connection to the auth service"
        if hub.nodes.proven:
            return None
        if not hub.nodes.listed:
            return "no agent node is up"
        return "no stream to an agent node carries anything"

    async def failed(self) -> None:
        """An edge never ends by itself: it holds nothing that could be lost."""
        await asyncio.get_running_loop().create_future()

    async def stop(self) -> None:
        """Refuse new ones, see everybody off, close. Safe to call twice."""
        hub = self._hub
        if hub is None or self._stopped:
            return
        self._stopped = True
        hub.draining = True
        drained = asyncio.create_task(hub.drain(), name="drain")
        await asyncio.wait({drained}, timeout=LAST_CALL_S)
        if self._site is not None:
            await self._site.stop()
        await drained
        self._doorway.close()
        await self._runner.cleanup()
        await hub.close()
        await self._nodes.close()
        await self._auth.close()
        await self._registry.close()
        await self._violations.close()
        self._probes.stop()
        self._tracing.close()


def hub_settings(settings: EdgeSettings) -> HubSettings:
    """The part of the settings that the hub needs."""
    return HubSettings(
        limits=Limits(
            max_message_bytes=settings.max_message_bytes,
            messages_per_minute=settings.messages_per_minute,
            max_connections=settings.max_connections_per_user,
            heartbeat_ms=int(settings.heartbeat_seconds * 1000),
        ),
        max_connections=settings.max_connections,
        max_write_buffer_bytes=settings.max_write_buffer_bytes,
        max_connection_age_ms=settings.max_connection_age_s * 1000,
        drain_spread_ms=settings.drain_spread_ms,
    )
