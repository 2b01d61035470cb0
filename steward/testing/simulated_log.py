"""The log process in the simulation: the real rules of `LogState`, a disk that takes its time.

What waits is written together. It is nowhere until that write is over, so a crash before loses it
unanswered, and a crash after it loses the answers alone.
"""

from collections.abc import Callable
from typing import Any

from agent_service.core.journal import (
    Append,
    AppendOutcome,
    Committed,
    Fenced,
    RecordKind,
    Seal,
    Sealed,
    SealOutcome,
)
from agent_service.log.memory import LogState
from agent_service.log.port import EventPage, ReadRange
from steward.model.keys import UserKey
from steward.testing.faults import Faults
from steward.testing.invariants import Invariants
from steward.testing.simulated_network import End, Network, Process, Uplink
from steward.testing.world import World

Operation = Append | Seal
Outcome = AppendOutcome | SealOutcome


class SimulatedLog(Process):
    """The log process, over a state that outlives it."""

    def __init__(
        self,
        world: World,
        network: Network,
        state: LogState,
        invariants: Invariants,
        faults: Faults,
        rate: int,
    ) -> None:
        super().__init__(world, network, "log", rate)
        self.state = state
        self.slow = faults.slow_log
        self.fenced = 0
        self._invariants = invariants
        self._waiting: list[tuple[End, int, Operation]] = []
        self._writing = False

    def begin(self) -> None:
        self._waiting = []
        self._writing = False

    def accepted(self, end: End, hello: Any) -> None:
        end.on_message = lambda request: self._take(end, *request)
        end.send(None)

    def read(self, user: UserKey, after: int, until: int) -> EventPage:
        wanted = ReadRange(after=after, until=until, limit=256, max_bytes=1 << 20)
        return self.state.read(user, wanted)

    def largest_fence(self) -> int:
        return self.state.summary("log").largest_fence

    def open_users(self) -> list[UserKey]:
        """Who has an open run, from the index that the log keeps of them."""
        streams = self.state._streams.items()
        run = RecordKind.RUN
        return [user for user, stream in streams if any(kind is run for kind, _ in stream.records)]

    def _take(self, end: End, number: int, operation: Operation) -> None:
        self._waiting.append((end, number, operation))
        self._write()

    def _write(self) -> None:
        if self._writing or not self._waiting:
            return
        self._writing = True
        batch, self._waiting = self._waiting, []
        slow = self.world.chance(self.slow)
        took_ms = self.world.between(200, 4_000) if slow else self.world.between(0, 4)
        self.after(took_ms, lambda: self._written(batch))

    def _written(self, batch: list[tuple[End, int, Operation]]) -> None:
        self._writing = False
        for end, number, operation in batch:
            end.send((number, self.apply(operation)))
        self._write()

    def apply(self, operation: Operation) -> Outcome:
        """The operation is durable now."""
        if isinstance(operation, Seal):
            return self.seal(operation)
        user = operation.user
        before = self._mark(user)
        outcome = self.state.append(operation)
        changed = self._mark(user) != before
        if isinstance(outcome, Committed) and changed:
            self._note("stored", operation)
            self._invariants.stored(operation, before[1])
        else:
            if isinstance(outcome, Fenced):
                self.fenced += 1
            self._note(type(outcome).__name__, operation)
            self._invariants.refused(user, changed)
        return outcome

    def seal(self, seal: Seal) -> SealOutcome:
        before = self._mark(seal.user)
        outcome = self.state.seal(seal)
        self.world.note("log: seal {} under {}: {}", seal.user, seal.epoch, type(outcome).__name__)
        if isinstance(outcome, Sealed):
            self._invariants.sealed(seal, outcome)
        else:
            self._invariants.refused(seal.user, self._mark(seal.user) != before)
        return outcome

    def _mark(self, user: UserKey) -> tuple[int, int, int]:
        """What every change of a stream changes: its appends, its events and its records."""
        stream = self.state._streams.get(user)
        if stream is None:
            return (0, 0, 0)
        return (stream.last_append_number, len(stream.events), len(stream.records))

    def _note(self, what: str, append: Append) -> None:
        first = append.expected_sequence
        self.world.note(
            "log: append {} under {} from {}, {} events: {}",
            append.user,
            append.epoch,
            first,
            len(append.events),
            what,
        )


class LogUplink:
    """A node's stream to the log: what has no answer is sent again on the next stream, as it is."""

    def __init__(self, owner: Process, log: SimulatedLog) -> None:
        self._unanswered: dict[int, tuple[Operation, Callable[[Any], None]]] = {}
        self._last = 0
        self._ready = False
        self._uplink = Uplink(
            owner,
            lambda: (log, owner.name),
            up=lambda: None,
            message=self._message,
            down=self._down,
        )

    @property
    def connected(self) -> bool:
        return self._ready

    def write(self, operation: Operation, answer: Callable[[Any], None]) -> None:
        """Send an append or a seal; `answer` is called once, if ever."""
        self._last += 1
        self._unanswered[self._last] = (operation, answer)
        if self._ready:
            self._uplink.send((self._last, operation))

    def _down(self) -> None:
        self._ready = False

    def _message(self, message: tuple[int, Outcome] | None) -> None:
        if message is None:
            self._ready = True
            self._uplink.settled()
            for number, (operation, _) in list(self._unanswered.items()):
                self._uplink.send((number, operation))
            return
        number, outcome = message
        waiting = self._unanswered.pop(number, None)
        if waiting is not None:
            waiting[1](outcome)
