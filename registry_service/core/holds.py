"""Fenced incarnations that may still be executing: users of strict tenants wait for them.

A fence on suspicion (C, D) says nothing about whether the process stopped. It stops by itself
when it could not renew its lease, so its strict users wait until then, plus a margin for the
rates of two clocks. Proof (A) that comes later ends the wait at once. Holds are in the store; a
registry that starts again waits a whole TTL, since it does not know how much of it is over.
"""

from registry_service.core.config import RegistryConfig
from registry_service.core.pipeline import StorePipeline
from registry_service.core.transactions import Evidence, Hold, LiftHold
from registry_service.core.turn import Turn
from steward.model.keys import NodeId, NodeIncarnation


class Holds:
    """Knows when each hold ends, and lifts it."""

    def __init__(self, config: RegistryConfig, turn: Turn, store: StorePipeline) -> None:
        self._config = config
        self._turn = turn
        self._store = store
        self._pids: dict[NodeIncarnation, int] = {}
        self._until_ms: dict[NodeIncarnation, int] = {}

    def needed(self, evidence: Evidence) -> bool:
        """Whether a fence on this evidence needs a hold."""
        suspected = evidence in (Evidence.MISSED_BEATS, Evidence.LEASE_OVER)
        return suspected and bool(self._config.strict_tenants)

    def recover(self, holds: tuple[Hold, ...]) -> None:
        for hold in holds:
            self.begin(hold.incarnation, hold.pid, self._turn.now_ms + self._config.ttl_ms)

    def begin(self, incarnation: NodeIncarnation, pid: int, lease_until_ms: int) -> None:
        """The fence with its hold is in the store; the lease is the last that the node had."""
        over = max(lease_until_ms, self._turn.now_ms) + self._config.hold_margin_ms
        self._pids[incarnation] = pid
        self._until_ms[incarnation] = over

    def incarnations(self) -> tuple[NodeIncarnation, ...]:
        """Who was fenced not long ago and may not know it yet."""
        return tuple(self._until_ms)

    def prove(self, node_id: NodeId, pid: int) -> None:
        """The process was reaped: whatever it held is free."""
        for incarnation, held in list(self._pids.items()):
            if incarnation.node_id == node_id and held == pid:
                self._lift(incarnation)

    def tick(self) -> None:
        for incarnation, until_ms in list(self._until_ms.items()):
            if until_ms <= self._turn.now_ms:
                self._lift(incarnation)

    def next_deadline(self) -> int | None:
        return min(self._until_ms.values(), default=None)

    def _lift(self, incarnation: NodeIncarnation) -> None:
        del self._pids[incarnation], self._until_ms[incarnation]

        def lifted(_: object) -> None:
            self._turn.more_room = True

        self._store.submit(LiftHold(incarnation), lifted, first=True)
