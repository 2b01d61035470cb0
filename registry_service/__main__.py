"""`python -m registry_service`: the composition root of the registry."""

import asyncio
import gc
import logging
import os
import sys

from prometheus_client import CollectorRegistry

from registry_service.audit.mirror import AuditMirror
from registry_service.audit.schema import Database
from registry_service.census.rounds import Census, CensusConfig
from registry_service.core.registry import Registry
from registry_service.driver import RegistryDriver
from registry_service.server import ALLOWED, RegistryServicer
from registry_service.settings import RegistrySettings
from registry_service.store.choice import make_store
from registry_service.uplink import TcpDialer
from steward.config.settings import SettingsError, load
from steward.rpc.factory import make_server
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import RoleVerifier
from steward.runtime.service import EnvironmentUnusable, run
from steward.telemetry.catalog import RegistryMetrics
from steward.telemetry.logs import configure, fields
from steward.telemetry.otlp import make_tracing
from steward.telemetry.probes import ProcessProbes
from steward.v1 import registry_service_pb2_grpc

STOP_GRACE_S = 1.0
# The store's thread takes the interpreter back after each statement: it must not wait 5 ms for it.
SWITCH_S = 0.0005
# A batch of placements makes thousands of objects and no cycles: look for those less often.
COLLECT_AFTER = 50_000

_log = logging.getLogger(__name__)


class RegistryService:
    """The registry as a `Service`: store and machine first, then the door."""

    def __init__(self, settings: RegistrySettings) -> None:
        self.metrics = CollectorRegistry()
        self._settings = settings
        self._catalog = RegistryMetrics(self.metrics)
        self._driver: RegistryDriver | None = None
        self._probes = ProcessProbes(self._catalog)
        self._serving = False
        self._audit: asyncio.Task[None] | None = None

    async def start(self) -> None:
        settings = self._settings
        key = load_or_create_key(settings.data, CONTROL_KEY)
        store, clock = make_store(settings)
        machine = Registry(settings.config())
        self._tracing = make_tracing("registry", settings.id, settings)
        driver = RegistryDriver(machine, store, TcpDialer(), self._catalog, clock)
        await driver.start()
        self._driver = driver
        census = Census(driver, self._catalog, CensusConfig(interval_ms=settings.census_ms))
        servicer = RegistryServicer(driver, settings.cluster, self._catalog, self._tracing, census)
        self._server = make_server(
            RoleVerifier(key, settings.cluster), ALLOWED, servicer.notice_foreign
        )
        registry_service_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, self._server)
        address = f"{settings.host}:{settings.grpc_port}"
        try:
            self._server.add_insecure_port(address)
        except RuntimeError:
            raise EnvironmentUnusable(f"port {address} can't be used; choose another") from None
        await self._server.start()
        self._census = asyncio.create_task(census.run(), name="registry-census")
        if settings.audit:
            database = Database(settings.audit, settings.audit_pooled)
            mirror = AuditMirror(
                database, settings.cluster, driver.store, driver.tails, settings.audit_days
            )
            self._audit = asyncio.create_task(mirror.run(), name="registry-audit")
        self._probes.start()
        self._serving = True

    def unready(self) -> str | None:
        return None if self._serving else "the store is not open yet, or another registry has it"

    async def failed(self) -> None:
        assert self._driver is not None
        cause = await self._driver.failed()
        _log.error(
            "the registry ends", extra=fields(cause=cause, do="mend the cause; start it again")
        )

    async def stop(self) -> None:
        """Stop the machine before the streams: their end must not look like nodes that died."""
        self._serving = False
        self._probes.stop()
        driver, self._driver = self._driver, None
        if driver is not None:
            self._census.cancel()
            await asyncio.wait({self._census})
            if self._audit is not None:
                self._audit.cancel()
                await asyncio.wait({self._audit})
            await driver.stop()
            await self._server.stop(STOP_GRACE_S)
            self._tracing.close()


def main() -> None:
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(COLLECT_AFTER)
    try:
        settings = load(RegistrySettings, sys.argv[1:], os.environ)
        configure(settings, "registry")
    except SettingsError as error:
        print(f"steward: {error}", file=sys.stderr)
        sys.exit(2)
    run(lambda: RegistryService(settings), settings)


if __name__ == "__main__":
    main()
