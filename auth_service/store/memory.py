"""The auth store in memory, for tests and simulations: forgets all when the process ends."""

import asyncio
from collections.abc import Sequence

from auth_service.core.grants import Grant
from auth_service.store.port import Change, Keep, Take, Told
from steward.model.keys import UserKey


class MemoryAuthStore:
    """An `AuthStore` over dictionaries."""

    def __init__(self) -> None:
        self._grants: dict[bytes, Grant] = {}
        self._marks: dict[UserKey, int] = {}

    async def follow(self, told: Told) -> None:
        told(dict(self._marks))

    def unsure(self) -> str | None:
        return None

    async def apply(self, changes: Sequence[Change], now_ms: int) -> list[Grant | None]:
        self._grants = {d: g for d, g in self._grants.items() if g.expires_at_ms > now_ms}
        results: list[Grant | None] = []
        for change in changes:
            result: Grant | None = None
            if isinstance(change, Keep):
                self._grants[change.digest] = change.grant
            elif isinstance(change, Take):
                result = self._grants.pop(change.digest, None)
            else:
                known = self._marks.get(change.user, 0)
                self._marks[change.user] = max(known, change.issued_before_ms)
            results.append(result)
        return results

    async def failed(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        """Nothing to close."""
