"""The one place where a manager is made: from a grant and what `seal` returned, nothing else."""

from agent_service.core.grants import Grant
from agent_service.core.journal import Sealed
from agent_service.core.manager import Manager
from agent_service.core.policy import ManagerPolicy


def make_manager(grant: Grant, sealed: Sealed, policy: ManagerPolicy) -> Manager:
    """A manager under the grant's epoch. Raises RuntimeError for a grant that was used before."""
    return Manager(grant, sealed, policy)
