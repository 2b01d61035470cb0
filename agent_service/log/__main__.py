"""`python -m agent_service.log`: the process that alone opens the event database of a machine.

It ends with code 2 when another process holds the database, and with code 1 when the
database failed for good; whoever started it starts it again, and nodes send again what
had no answer.
"""

import os
import sys

from prometheus_client import CollectorRegistry

from agent_service.log.server import ALLOWED, LogServicer
from agent_service.log.settings import LogSettings
from agent_service.log.sqlite import SqliteLog
from steward.config.settings import SettingsError, load
from steward.model.violations import Violation
from steward.rpc.factory import make_server
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials, RoleVerifier
from steward.rpc.violations import ViolationReporter
from steward.runtime.service import EnvironmentUnusable, run
from steward.telemetry.catalog import LogMetrics
from steward.v1.log_service_pb2_grpc import add_LogServiceServicer_to_server

STOP_GRACE_S = 2.0


class LogProcess:
    """The log service: engine and gRPC server."""

    def __init__(self, settings: LogSettings) -> None:
        self._settings = settings
        self.metrics = CollectorRegistry()
        self._log = SqliteLog(
            settings.data,
            LogMetrics(self.metrics),
            commit_appends=settings.commit_appends,
            readers=settings.readers,
        )
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
            self._violations = ViolationReporter(settings.registry, credentials)
        self._servicer = LogServicer(self._log, settings.cluster, self._report)
        await self._log.open()
        self._opened = True
        self._server = make_server(RoleVerifier(key, settings.cluster), ALLOWED)
        add_LogServiceServicer_to_server(self._servicer, self._server)
        try:
            self.port = self._server.add_insecure_port(f"{settings.host}:{settings.grpc_port}")
        except RuntimeError:
            await self._log.close()
            raise EnvironmentUnusable(
                f"gRPC port {settings.host}:{settings.grpc_port} can't be used; is it taken?"
            ) from None
        await self._server.start()
        self._serving = True

    def _report(self, violation: Violation) -> None:
        if self._violations is not None:
            self._violations.report(violation)

    def unready(self) -> str | None:
        """Why nodes can't append here now."""
        return None if self._serving else "the event database is not open"

    async def failed(self) -> None:
        """Returns when the database failed for good."""
        await self._log.failed()

    async def stop(self) -> None:
        """End the streams, commit what came, close the database. Safe to call twice."""
        if self._serving:
            self._serving = False
            self._servicer.end_streams()
            await self._server.stop(STOP_GRACE_S)
        if self._violations is not None:
            await self._violations.close()
        if self._opened:
            await self._log.close()


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
