"""The log process in the simulation: the real rules, with requests and answers that come late."""

from collections.abc import Callable

from agent_service.core.journal import (
    Append,
    AppendOutcome,
    Committed,
    Fenced,
    Seal,
    Sealed,
    SealOutcome,
)
from agent_service.log.memory import LogState
from agent_service.log.port import ReadRange
from steward.model.keys import UserKey
from steward.testing.invariants import Invariants
from steward.testing.world import World


class SimulatedLog:
    """The log process: requests reach it late, answers return late, a restart loses both."""

    def __init__(self, world: World, state: LogState, invariants: Invariants) -> None:
        self._world = world
        self.state = state
        self._invariants = invariants
        self._life = 0
        self._heads: dict[UserKey, int] = {}
        self.listeners: list[Callable[[], None]] = []
        self.fenced = 0

    def append(self, append: Append, answer: Callable[[AppendOutcome], None]) -> None:
        life = self._life
        self._world.after(self._delay(), lambda: self._append(life, append, answer))

    def seal(self, seal: Seal, answer: Callable[[SealOutcome], None]) -> None:
        life = self._life
        self._world.after(self._delay(), lambda: self._seal(life, seal, answer))

    def read(self, user: UserKey, after: int, until: int) -> tuple[bytes, ...]:
        wanted = ReadRange(after=after, until=until, limit=1000, max_bytes=1 << 22)
        return self.state.read(user, wanted).events

    def restart(self) -> None:
        """Lose what is under way, in both directions, and start again."""
        self._life += 1
        self._world.after(200, self._reconnect)

    def _reconnect(self) -> None:
        for resend in self.listeners:
            resend()

    def _while(self, life: int, action: Callable[[], None]) -> Callable[[], None]:
        """`action`, unless the process was restarted before it happens."""
        return lambda: action() if life == self._life else None

    def _append(self, life: int, append: Append, answer: Callable[[AppendOutcome], None]) -> None:
        if life != self._life:
            return
        before = self._heads.get(append.user, 0)
        outcome = self.state.append(append)
        if isinstance(outcome, Committed) and outcome.next_sequence - 1 != before:
            self._heads[append.user] = outcome.next_sequence - 1
            self._invariants.stored(append, before)
        if isinstance(outcome, Fenced):
            self.fenced += 1
        self._world.after(self._delay(), self._while(life, lambda: answer(outcome)))

    def _seal(self, life: int, seal: Seal, answer: Callable[[SealOutcome], None]) -> None:
        if life == self._life:
            outcome = self.state.seal(seal)
            if isinstance(outcome, Sealed):
                self._invariants.sealed(seal.user, seal.epoch)
            self._world.after(self._delay(), self._while(life, lambda: answer(outcome)))

    def _delay(self) -> int:
        return self._world.random.choice((0, 1, 1, 2, 5, 30))
