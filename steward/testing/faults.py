"""What goes wrong in a simulated world and how often, and the constants that its parts share."""

import dataclasses
import random
from dataclasses import dataclass
from typing import Final, Self

from agent_service.core.policy import AgentPolicy, ManagerPolicy

POLICY: Final = ManagerPolicy((AgentPolicy("played", "queue"),), messages_per_minute=1_000_000)
TRACE: Final = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
STRICT_TENANT: Final = "strict"
WALL_MS: Final = 1_700_000_000_000


@dataclass(frozen=True, slots=True)
class Faults:
    """How often what goes wrong. Fields in `_ms` are mean times between two; 0 means never.

    The defaults switch everything on; `Faults.none()` everything off; `Faults.of(seed)` picks
    a mix by the seed, so that rare combinations occur and others are not hidden by them.
    """

    # Processes end.
    node_kill_ms: int = 4_000
    machine_loss_ms: int = 20_000
    edge_kill_ms: int = 15_000
    registry_restart_ms: int = 9_000
    log_restart_ms: int = 10_000
    # Processes stand still: garbage collection, SIGSTOP, an overloaded machine.
    node_pause_ms: int = 5_000
    other_pause_ms: int = 15_000
    longest_pause_ms: int = 12_000
    # The network. `slow_network`: how likely one direction of a stream is late by up to 1.5 s.
    partition_ms: int = 4_000
    longest_partition_ms: int = 18_000
    stream_reset_ms: int = 8_000
    slow_network: float = 0.1
    # Disks: how likely a write takes up to seconds.
    slow_log: float = 0.02
    slow_store: float = 0.03
    # The placement store: how likely a result is lost, half of them without their effect.
    unknown_store_result: float = 0.05
    spurious_loss_ms: int = 15_000
    restore_ms: int = 15_000
    # Planned: operators and supervisors.
    drain_ms: int = 10_000
    move_ms: int = 4_000
    evict_ms: int = 20_000
    operator_fence_ms: int = 25_000
    death_report: float = 0.5
    # Clocks: rates are off by so many thousandths at most (the bound of X); machines are suspended.
    clock_drift: int = 100
    suspend_ms: int = 20_000

    @classmethod
    def none(cls) -> Self:
        """A world in which nothing goes wrong."""
        return cls(**{field.name: 0 for field in dataclasses.fields(cls)})

    @classmethod
    def of(cls, seed: int) -> Self:
        """A mix by the seed: each fault on with one half, from rare to three times as often."""
        chosen = random.Random(f"faults {seed}")
        values: dict[str, int | float] = {}
        for field in dataclasses.fields(cls):
            usual = field.default
            assert isinstance(usual, int | float)
            on, scale = chosen.random() < 0.5, chosen.choice((0.35, 0.6, 1.0, 1.8))
            if field.name == "clock_drift":
                values[field.name] = int(usual * min(scale, 1.0)) if on else 0
            elif field.name.startswith("longest_"):
                values[field.name] = int(usual * chosen.choice((0.2, 0.6, 1.0, 1.6)))
            else:
                values[field.name] = type(usual)(usual * scale) if on else type(usual)(0)
        return cls(**values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        on = [f"{f.name}={getattr(self, f.name)}" for f in fields if getattr(self, f.name)]
        return " ".join(name for name in on if not name.startswith("longest_")) or "none"
