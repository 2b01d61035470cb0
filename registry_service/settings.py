"""Settings of the registry: the process, and the numbers that operators may turn."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from registry_service.core.config import RegistryConfig
from steward.config.settings import ServiceSettings, setting

SQLITE = "sqlite"


@dataclass(frozen=True, slots=True)
class RegistrySettings(ServiceSettings):
    """`registry.*`; the file of the embedded store is `<data>/registry.db`."""

    SECTION: ClassVar[str] = "registry"

    store: str = setting(
        SQLITE,
        help="Where placements are kept: `sqlite`, in the data directory, for one registry; or "
        "`etcd://host:port,host:port,host:port/name`, for any number, of which one serves.",
    )
    store_ca: Path | None = setting(
        None, help="File of the authorities that etcd's certificate is checked with; makes it TLS."
    )
    store_cert: Path | None = setting(
        None, help="File of the certificate that this process shows to etcd; makes it TLS."
    )
    store_key: Path | None = setting(None, help="File of the private key of `store_cert`.")
    store_user: str = setting("", help="User of etcd; empty: no authentication.")
    store_password: str = setting("", help="Password of `store_user`.", secret=True)
    store_lease_s: int = setting(
        5,
        help="After what time another registry on etcd serves when this one is killed; one that is"
        " stopped is followed at once. 2 to 60.",
        unit="s",
    )

    ttl_ms: int = setting(
        5_000, help="Lease of a node: fenced after this long without a renewal.", unit="ms"
    )
    beat_ms: int = setting(250, help="Time between beats, both ways.", unit="ms")
    resolve_wait_ms: int = setting(
        2_000, help="How long a resolve waits for a node before it is refused.", unit="ms"
    )
    cached_placements: int = setting(262_144, help="Placements kept in memory.", unit="users")
    most_waiting: int = setting(65_536, help="Resolves that may wait at once.", unit="users")
    handoffs_at_once: int = setting(
        32, help="Users that a draining node hands off at a time.", unit="users"
    )
    strict_tenants: tuple[str, ...] = setting(
        (), help="Tenants whose users wait until a suspected node has stopped for sure."
    )
    log_floor: bool = setting(
        True, help="Grant nothing until a node has told the largest fence in the event log."
    )
    least_generation: int = setting(
        0,
        help="Raise the generation of epochs to this at the start, and let all nodes join anew; "
        "for a restore that the registry can't see by itself. 0 to 31.",
    )
    census_ms: int = setting(
        5_000,
        help="Time between two censuses of who holds and is attached to whom; 0: only when asked.",
        unit="ms",
    )
    kept_violations: int = setting(
        100_000, help="Recorded violations that are kept; the oldest refusals go.", unit="rows"
    )
    audit: str = setting(
        "",
        help="postgresql://… where the ledger and all violations are copied to. Empty: nowhere.",
        secret=True,
    )
    audit_pooled: bool = setting(
        False, help="The audit's database is behind PgBouncer in transaction mode."
    )
    audit_days: float = setting(0.0, help="How long the copies are kept; 0: for ever.", unit="d")

    def name(self) -> str:
        """The id of this process; `registry` unless set."""
        return self.id or "registry"

    def config(self) -> RegistryConfig:
        """The numbers of the machine."""
        return RegistryConfig(
            registry_id=self.name(),
            ttl_ms=self.ttl_ms,
            beat_ms=self.beat_ms,
            resolve_wait_ms=self.resolve_wait_ms,
            cached_placements=self.cached_placements,
            most_waiting=self.most_waiting,
            handoffs_at_once=self.handoffs_at_once,
            strict_tenants=frozenset(self.strict_tenants),
            log_floor=self.log_floor,
        )
