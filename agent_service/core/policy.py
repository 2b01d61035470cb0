"""What a node lets its managers do: the agents they know, and the limits of one user.

Apart from the manager, which only the host may import, so that the composition root can
make these from settings.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AgentPolicy:
    """What the manager must know of an agent.

    `on_crash`: `resume`, or `fail` for one whose runs end when their node is lost.
    """

    name: str
    overlap: str
    on_crash: str = "resume"


@dataclass(frozen=True, slots=True)
class ManagerPolicy:
    """Immutable configuration, shared by all managers of a node. The first agent is the default."""

    agents: tuple[AgentPolicy, ...]
    max_waiting_runs: int = 32
    messages_per_minute: int = 600
