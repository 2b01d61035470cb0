"""`python -m auth_service`: the composition root of auth."""

import os
import socket
import sys

import grpc
from prometheus_client import CollectorRegistry

from auth_service.host import Authority
from auth_service.server import ALLOWED, AuthServicer
from auth_service.settings import AuthSettings
from auth_service.store.port import AuthStore
from auth_service.store.postgres.connecting import Database
from auth_service.store.postgres.engine import PostgresAuthStore
from auth_service.store.sqlite import SqliteAuthStore
from steward.config.settings import SettingsError, load
from steward.rpc.factory import make_server
from steward.rpc.keys import CONTROL_KEY, USER_KEY, load_or_create_key
from steward.rpc.roles import RoleVerifier
from steward.runtime.heap import settle
from steward.runtime.service import EnvironmentUnusable, run
from steward.telemetry.catalog import AuthMetrics
from steward.telemetry.logs import configure
from steward.telemetry.otlp import make_tracing
from steward.telemetry.probes import ProcessProbes
from steward.v1.auth_service_pb2_grpc import add_AuthServiceServicer_to_server

GRACE_S = 2.0


class AuthProcess:
    """Auth as `steward.runtime.service.run` drives it."""

    def __init__(self, settings: AuthSettings) -> None:
        self.metrics = CollectorRegistry()
        self._settings = settings
        self._id = settings.id or f"auth-{socket.gethostname()}"
        self._tracing = make_tracing("auth", self._id, settings)
        self._metrics = AuthMetrics(self.metrics)
        self._probes = ProcessProbes(self._metrics)
        self._store: AuthStore | None = None
        self._servicer: AuthServicer | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        settings = self._settings
        control = load_or_create_key(settings.data, CONTROL_KEY)
        user_key = load_or_create_key(settings.data, USER_KEY)
        store = await self._open_store()
        authority = await Authority.open(
            user_key, store, self._metrics, login_token_ttl_s=settings.login_token_ttl_s
        )
        servicer = AuthServicer(authority, settings.cluster, self._id, self._tracing)
        server = make_server(RoleVerifier(control, settings.cluster), ALLOWED)
        add_AuthServiceServicer_to_server(servicer, server)
        address = f"{settings.host}:{settings.grpc_port}"
        try:
            server.add_insecure_port(address)
        except RuntimeError:
            raise EnvironmentUnusable(f"gRPC port {address} can't be used") from None
        await server.start()
        self._servicer, self._server = servicer, server
        settle()
        self._probes.start()

    async def _open_store(self) -> AuthStore:
        settings = self._settings
        if not settings.store:
            self._store = SqliteAuthStore(settings.data / "auth.db")
            return self._store
        store = self._store = PostgresAuthStore(Database(settings.store, settings.pooled))
        await store.open()
        return store

    def unready(self) -> str | None:
        """Why nobody can be let in now."""
        if self._store is not None and (why := self._store.unsure()) is not None:
            return why
        return None if self._server is not None else "starting"

    async def failed(self) -> None:
        assert self._store is not None
        await self._store.failed()

    async def stop(self) -> None:
        self._probes.stop()
        if self._servicer is not None:
            self._servicer.close()
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(GRACE_S)
        if self._store is not None:
            store, self._store = self._store, None
            await store.close()
        self._tracing.close()


def main() -> None:
    try:
        settings = load(AuthSettings, sys.argv[1:], os.environ)
        configure(settings, "auth")
    except SettingsError as error:
        print(f"steward: {error}", file=sys.stderr)
        sys.exit(2)
    run(lambda: AuthProcess(settings), settings)


if __name__ == "__main__":
    main()
