"""Settings of the auth service."""

from dataclasses import dataclass
from typing import ClassVar

from steward.config.settings import ServiceSettings, SettingsError, setting
from steward.postgres.connecting import is_postgres
from steward.tokens import MAX_LIFETIME_S


@dataclass(frozen=True, slots=True)
class AuthSettings(ServiceSettings):
    """What `steward auth` can be told."""

    SECTION: ClassVar[str] = "auth"

    login_token_ttl_s: int = setting(
        12 * 3600, help="Life of the token that a login code is exchanged for.", unit="s"
    )

    store: str = setting(
        "",
        help="`postgresql://user@host/database`: where one-use secrets and revocations are, for any"
        " number of auth processes. Empty: `auth.db` in the data directory, for one.",
        secret=True,
    )
    pooled: bool = setting(False, help="`store` is reached through PgBouncer in transaction mode.")

    def __post_init__(self) -> None:
        if not 1 <= self.login_token_ttl_s <= MAX_LIFETIME_S:
            raise SettingsError(f"login_token_ttl_s: use 1 to {MAX_LIFETIME_S} seconds")
        if self.store and not is_postgres(self.store):
            raise SettingsError("auth.store: use a postgresql:// URL, or leave it empty")
