"""The `AuthStore` port: one-use secrets and revocations, whichever engine is behind it.

Every adapter passes the same conformance suite (`tests/integration/auth`). A batch of
changes is one atomic step: all of it is durable when `apply` returns, or none of it
happened. A secret is handed out at most once, over all callers and across restarts, and over all
auth processes when several share a store.

Of several processes each learns what another one revoked: from every batch that it applies, and
otherwise soon. `unsure` says when it may know less than that; who asks then is not to be answered.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from auth_service.core.grants import Grant
from steward.model.keys import UserKey

Told = Callable[[Mapping[UserKey, int]], None]
"""Is told revocations: users and their marks, some of which it may know."""


class StoreFailed(Exception):
    """The engine failed. Whether the batch was kept is unknown: answer nothing, and exit."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Remember what a new secret stands for. No secret is kept twice."""

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
    """All methods on one event loop."""

    async def follow(self, told: Told) -> None:
        """Tell all stored revocations before this returns, and later those of other processes.

        `told` runs on the event loop, between the steps of others, and must not raise. What
        another process stored before a batch is told before `apply` of that batch returns.
        Called once. Raises StoreFailed.
        """
        ...

    def unsure(self) -> str | None:
        """Why a revocation that was acknowledged elsewhere may be unknown here; None: all are."""
        ...

    async def apply(self, changes: Sequence[Change], now_ms: int) -> list[Grant | None]:
        """Make the changes in order; for each `Take` its grant, for everything else None.

        Grants that expired before `now_ms` are as good as absent. A batch with a `Mark` returns
        when no other process can be ignorant of it and sure. Raises StoreFailed, and
        StewardError(STORE_UNAVAILABLE) when the store can't be asked or its answer did not come:
        then all of the batch was done or nothing, and what it took is never handed out.
        """
        ...

    async def failed(self) -> None:
        """Returns when the engine failed for good."""
        ...

    async def close(self) -> None:
        """Finish what waits and close. Safe to call twice."""
        ...
