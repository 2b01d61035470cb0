"""`python -m agent_service.log`: the process between nodes and the event database.

With SQLite it alone opens the database of a machine, and ends with code 2 when another
process holds it. With PostgreSQL any number of them may work side by side. It ends with code
1 when the database failed for good; whoever started it starts it again, and nodes send again
what had no answer.
"""

import asyncio
import os
import sys

from prometheus_client import CollectorRegistry

from agent_service.log.compacting import CLOCK_MS
from agent_service.log.framed import FramedNodes
from agent_service.log.framing import PREFACE
from agent_service.log.port import LogEngine
from agent_service.log.postgres.connecting import Database
from agent_service.log.postgres.engine import PostgresLog
from agent_service.log.retention import clock_ms, keep_days
from agent_service.log.server import ALLOWED, LogServicer
from agent_service.log.settings import LogSettings
from agent_service.log.sqlite import SqliteLog
from steward.config.settings import SettingsError, load
from steward.model.violations import Violation
from steward.postgres.connecting import is_postgres
from steward.rpc.factory import make_server
from steward.rpc.front import LOOPBACK, Front
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials, RoleVerifier
from steward.rpc.violations import ViolationReporter
from steward.runtime.service import EnvironmentUnusable, run
from steward.telemetry.catalog import LogMetrics
from steward.telemetry.otlp import make_tracing
from steward.telemetry.probes import ProcessProbes
from steward.v1.log_service_pb2_grpc import add_LogServiceServicer_to_server

STOP_GRACE_S = 2.0
MOST_DAYS = 36_500


def make_engine(settings: LogSettings, metrics: LogMetrics) -> LogEngine:
    """The engine that the settings name. Raises SettingsError for one that there is not."""
    if not 0 <= settings.keep_days < MOST_DAYS:
        raise SettingsError(f"log.keep_days: use 0 (for ever) or at most {MOST_DAYS}")
    if not settings.store:
        return SqliteLog(
            settings.data,
            metrics,
            commit_appends=settings.commit_appends,
            readers=settings.readers,
            clock_ms=clock_ms(settings.keep_days, CLOCK_MS),
        )
    if not is_postgres(settings.store):
        raise SettingsError("log.store: use a postgresql:// URL, or leave it empty for SQLite")
    return PostgresLog(
        Database(settings.store, settings.pooled),
        metrics,
        commit_appends=settings.commit_appends,
        writers=settings.writers,
        readers=settings.readers,
    )


class LogProcess:
    """The log service: engine, framed connections of nodes, and a gRPC server behind one port."""

    def __init__(self, settings: LogSettings) -> None:
        self._settings = settings
        self.metrics = CollectorRegistry()
        self._log_metrics = LogMetrics(self.metrics)
        self._log = make_engine(settings, self._log_metrics)
        self._probes = ProcessProbes(self._log_metrics)
        self._tracing = make_tracing("log", settings.id or "log", settings)
        self._retention: asyncio.Task[None] | None = None
        self._violations: ViolationReporter | None = None
        self._serving = False
        self._opened = False
        self.port = 0

    async def start(self) -> None:
        """Open the database, then listen."""
        settings = self._settings
        key = load_or_create_key(settings.data, CONTROL_KEY)
        if settings.registry:
            credentials = RoleCredentials(key, Role.LOG, settings.cluster, settings.id or "log")
            self._violations = ViolationReporter(
                settings.registry, credentials, tracing=self._tracing
            )
        self._servicer = LogServicer(self._log, settings.cluster, self._report)
        await self._log.open()
        self._opened = True
        verifier = RoleVerifier(key, settings.cluster)
        self._nodes = FramedNodes(
            self._log, settings.cluster, verifier, self._report, self._tracing
        )
        self._server = make_server(verifier, ALLOWED)
        add_LogServiceServicer_to_server(self._servicer, self._server)
        grpc_port = self._server.add_insecure_port(f"{LOOPBACK}:0")
        self._front = Front(PREFACE, self._nodes.accept, grpc_port)
        await self._server.start()
        try:
            self.port = await self._front.open(settings.host, settings.grpc_port)
        except OSError:
            await self._server.stop(None)
            await self._log.close()
            raise EnvironmentUnusable(
                f"gRPC port {settings.host}:{settings.grpc_port} can't be used; is it taken?"
            ) from None
        self._serving = True
        self._probes.start()
        if settings.keep_days:
            self._retention = asyncio.create_task(
                keep_days(self._log, settings.keep_days, self._log_metrics)
            )

    def _report(self, violation: Violation) -> None:
        if self._violations is not None:
            self._violations.report(violation)

    def unready(self) -> str | None:
        """Why nodes can't append here now."""
        return self._log.away or (None if self._serving else "the event database is not open")

    async def failed(self) -> None:
        """Returns when the database failed for good."""
        await self._log.failed()

    async def stop(self) -> None:
        """End the streams, commit what came, close the database. Safe to call twice."""
        self._probes.stop()
        if self._retention is not None:
            # One that failed did so because the engine did, which ends the process.
            self._retention.cancel()
            await asyncio.wait([self._retention])
        if self._serving:
            self._serving = False
            self._front.stop_listening()
            self._nodes.end()
            self._servicer.end_streams()
            await self._server.stop(STOP_GRACE_S)
            await self._front.close()
        if self._violations is not None:
            await self._violations.close()
        if self._opened:
            await self._log.close()
        self._tracing.close()


def main() -> None:
    """Run the log process from command line and environment."""
    try:
        settings = load(LogSettings, sys.argv[1:], os.environ)
    except SettingsError as error:
        print(f"steward: {error}", file=sys.stderr)
        sys.exit(2)
    run(lambda: LogProcess(settings), settings)


if __name__ == "__main__":
    main()
