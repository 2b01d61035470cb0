"""Settings of the edge."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from steward.config.settings import ServiceSettings, SettingsError, setting

STATIC = Path(__file__).parent / "static"


@dataclass(frozen=True, slots=True)
class EdgeSettings(ServiceSettings):
    """What `steward edge` can be told."""

    SECTION: ClassVar[str] = "edge"

    port: int = setting(8080, help="Public port: WebSocket, SSE, HTTP, the chat page.")
    registry: str = setting("127.0.0.1:7001", help="host:port of the registry.")
    auth: str = setting("127.0.0.1:7002", help="host:port of the auth service.")
    public_url: str = setting(
        "", help="URL that browsers use. Default: http://<host>:<port>, on loopback 127.0.0.1."
    )
    allowed_origins: tuple[str, ...] = setting(
        (), help="Further origins (http://name:port) whose pages and Host names are accepted."
    )
    max_message_bytes: int = setting(
        262_144, help="Longest client message; a longer one closes with 1009.", unit="bytes"
    )
    max_connections: int = setting(
        18_000, help="Connections of this edge; more are answered 503 with Retry-After."
    )
    max_connections_per_user: int = setting(
        32, help="Connections of one user at this edge; more are answered 429."
    )
    max_write_buffer_bytes: int = setting(
        1_048_576,
        help="Unsent bytes of one connection; more close it with SLOW_CONSUMER.",
        unit="bytes",
    )
    messages_per_minute: int = setting(
        600, help="Messages, cancels and inputs of one user at this edge.", unit="1/min"
    )
    heartbeat_seconds: float = setting(
        15.0, help="Silence after which a heartbeat is sent; twice that closes with 4007.", unit="s"
    )
    workers: int = setting(
        1, help="Processes on the public port, an edge each; limits are those of one process."
    )
    max_connection_age_s: int = setting(
        0,
        help="Age at which connections are asked to come again (up to a tenth earlier); 0: never.",
        unit="s",
    )
    drain_spread_ms: int = setting(
        1_500, help="Window over which a stopping edge closes its connections.", unit="ms"
    )

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_message_bytes", 1024, 16 * 1024 * 1024),
            ("max_connections", 1, 1_000_000),
            ("workers", 1, 64),
            ("max_connections_per_user", 1, 100_000),
            ("max_write_buffer_bytes", 65_536, 1 << 30),
            ("messages_per_minute", 1, 1_000_000),
            ("heartbeat_seconds", 0.1, 3600),
            ("drain_spread_ms", 0, 4_000),
            ("max_connection_age_s", 0, 10_000_000),
        ):
            if not least <= getattr(self, name) <= most:
                raise SettingsError(f"edge.{name}: use {least} to {most}")
        for origin in (*self.allowed_origins, *([self.public_url] if self.public_url else ())):
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise SettingsError(f"edge: {origin!r} is not an origin; use https://name:port")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the public port."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
