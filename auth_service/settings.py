"""Settings of the auth service."""

from dataclasses import dataclass
from typing import ClassVar

from steward.config.settings import ServiceSettings, SettingsError, setting
from steward.tokens import MAX_LIFETIME_S


@dataclass(frozen=True, slots=True)
class AuthSettings(ServiceSettings):
    """What `steward auth` can be told."""

    SECTION: ClassVar[str] = "auth"

    login_token_ttl_s: int = setting(
        12 * 3600, help="Life of the token that a login code is exchanged for.", unit="s"
    )

    def __post_init__(self) -> None:
        if not 1 <= self.login_token_ttl_s <= MAX_LIFETIME_S:
            raise SettingsError(f"login_token_ttl_s: use 1 to {MAX_LIFETIME_S} seconds")
