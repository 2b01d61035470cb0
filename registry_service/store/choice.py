"""Which store the settings name, made and not yet open."""

from collections.abc import Callable
from pathlib import Path

from registry_service.settings import SQLITE, RegistrySettings
from registry_service.store.etcd import EtcdStore
from registry_service.store.etcd_client import EtcdAccess
from registry_service.store.port import PlacementStore
from registry_service.store.sqlite import DATABASE, SqliteStore
from steward.config.settings import SettingsError
from steward.runtime.clock import boot_ms, wall_ms

ETCD = "etcd://"
LEAST_LEASE_S, MOST_LEASE_S = 2, 60
_DEFAULT_PORT = "2379"


def make_store(settings: RegistrySettings) -> tuple[PlacementStore, Callable[[], int]]:
    """The store, and the clock for the machine on it. Raises SettingsError."""
    if settings.store == SQLITE:
        sqlite = SqliteStore(
            settings.data / DATABASE,
            wall_ms,
            settings.kept_violations,
            settings.least_generation,
        )
        return sqlite, boot_ms
    if not settings.store.startswith(ETCD):
        scheme = settings.store.partition(":")[0]
        raise SettingsError(f"registry.store: {scheme!r} is neither sqlite nor {ETCD}...")
    if not LEAST_LEASE_S <= settings.store_lease_s <= MOST_LEASE_S:
        raise SettingsError(
            f"registry.store_lease_s: {LEAST_LEASE_S} to {MOST_LEASE_S} are possible"
        )
    access, cluster = etcd_access(settings)
    etcd = EtcdStore(
        access,
        cluster,
        settings.data,
        wall_ms,
        boot_ms,
        name=settings.name(),
        keep_violations=settings.kept_violations,
        least_generation=settings.least_generation,
        lease_s=settings.store_lease_s,
    )
    return etcd, etcd.guarded(boot_ms)


def etcd_access(settings: RegistrySettings) -> tuple[EtcdAccess, str]:
    """Endpoints and credentials, and the name under which this cluster is kept there."""
    hosts, _, cluster = settings.store.removeprefix(ETCD).partition("/")
    if "@" in hosts:
        raise SettingsError("registry.store: give user and password by settings of their own")
    endpoints = tuple(_with_port(host.strip()) for host in hosts.split(",") if host.strip())
    if not endpoints:
        raise SettingsError("registry.store names no host")
    if bool(settings.store_cert) != bool(settings.store_key):
        raise SettingsError("registry.store_cert and registry.store_key go together")
    access = EtcdAccess(
        endpoints,
        _contents(settings.store_ca, "ca"),
        _contents(settings.store_cert, "cert"),
        _contents(settings.store_key, "key"),
        settings.store_user,
        settings.store_password,
    )
    return access, cluster.strip("/") or settings.cluster


def _with_port(host: str) -> str:
    bare = host.endswith("]") if host.startswith("[") else ":" not in host
    return f"{host}:{_DEFAULT_PORT}" if bare else host


def _contents(path: Path | None, name: str) -> bytes:
    if path is None:
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"registry.store_{name}: {path}: {error.strerror}") from None
