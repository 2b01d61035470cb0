"""The `AuthStore` port: one-use secrets and revocations, whichever engine is behind it.

Every adapter passes the same conformance suite (`tests/integration/auth`). A batch of
changes is one atomic step: all of it is durable when `apply` returns, or none of it
happened. A secret is handed out at most once, over all callers and across restarts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from auth_service.core.grants import Grant
from steward.model.keys import UserKey


class StoreFailed(Exception):
    """The engine failed. Whether the batch was kept is unknown: answer nothing, and exit."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Remember what a new secret stands for."""

    digest: bytes
    grant: Grant


@dataclass(frozen=True, slots=True)
class Take:
    """Hand out what a secret stands for and forget it."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """Remember a revocation. A lower mark than the stored one changes nothing."""

    user: UserKey
    issued_before_ms: int


Change = Keep | Take | Mark


class AuthStore(Protocol):
    """One owner; all methods on one event loop."""

    async def marks(self) -> dict[UserKey, int]:
        """All stored revocations."""
        ...

    async def apply(self, changes: Sequence[Change], now_ms: int) -> list[Grant | None]:
        """Make the changes in order; for each `Take` its grant, for everything else None.

        Grants that expired before `now_ms` are as good as absent. Raises StoreFailed, and
        StewardError(STORE_UNAVAILABLE) when too much waits: nothing of the batch was done.
        """
        ...

    async def failed(self) -> None:
        """Returns when the engine failed for good."""
        ...

    async def close(self) -> None:
        """Finish what waits and close. Safe to call twice."""
        ...
