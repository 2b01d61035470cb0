"""Who somebody is, as auth decided from a token."""

from dataclasses import dataclass

from steward.model.keys import UserKey


@dataclass(frozen=True, slots=True)
class Identity:
    """A validated user. Times are Unix milliseconds."""

    user: UserKey
    scopes: tuple[str, ...]
    expires_at_ms: int
    issued_at_ms: int
    token_id: str
