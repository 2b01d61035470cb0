"""The one place where a manager is made: from a grant and what `seal` returned, nothing else."""

import asyncio
from dataclasses import dataclass, field

from agent_service.core.commands import Evict, HandOff, Release
from agent_service.core.grants import Grant
from agent_service.core.journal import Sealed
from agent_service.core.manager import Manager
from agent_service.core.policy import ManagerPolicy
from agent_service.host.edges import EdgeCommand
from steward.model.keys import Epoch

Departure = Release | HandOff | Evict


@dataclass(slots=True)
class Activation:
    """A manager in the making, what waits for it, in order, and how it is to end at once."""

    epoch: Epoch
    waiting: list[EdgeCommand] = field(default_factory=list)
    departure: Departure | None = None
    granted: bool = False
    task: "asyncio.Future[None]" = field(init=False)


def make_manager(grant: Grant, sealed: Sealed, policy: ManagerPolicy) -> Manager:
    """A manager under the grant's epoch. Raises RuntimeError for a grant that was used before."""
    return Manager(grant, sealed, policy)
