"""What goes wrong in a simulated world and how often, and the constants that its parts share."""

from dataclasses import dataclass

from agent_service.core.policy import AgentPolicy, ManagerPolicy
from steward.model.keys import EdgeId

POLICY = ManagerPolicy((AgentPolicy("played", "queue"),), messages_per_minute=1_000_000)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
EDGE = EdgeId("edge-0")
WALL_MS = 1_700_000_000_000


@dataclass(frozen=True, slots=True)
class Faults:
    """How often what goes wrong, as mean milliseconds between two; 0 means never."""

    kill_ms: int = 1_500
    pause_ms: int = 2_500
    longest_pause_ms: int = 9_000
    registry_restart_ms: int = 6_000
    log_restart_ms: int = 4_000
    unknown_store_result: float = 0.05
