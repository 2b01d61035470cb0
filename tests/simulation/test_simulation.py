"""The real cores under seeded faults; and each guard, taken away, must break an invariant."""

import dataclasses

import pytest

from agent_service.core.journal import Append, AppendOutcome, Committed, Seal, Sealed, SealOutcome
from agent_service.log.memory import LogState
from steward.model.keys import Sequence
from steward.testing.invariants import InvariantBroken
from steward.testing.simulation import Faults, Simulation

SEEDS = range(1, 61)
SEEDS_TO_FIND = range(1, 81)


@pytest.mark.parametrize("first", SEEDS[::20])
def test_no_fault_breaks_an_invariant(first: int) -> None:
    fenced = 0
    for seed in range(first, first + 20):
        simulation = Simulation(seed)
        simulation.run()
        fenced += simulation.registry.fences
    assert fenced > 20, "the faults must have struck"


def test_the_same_seed_gives_the_same_steps() -> None:
    traces = []
    for _ in range(2):
        simulation = Simulation(7)
        simulation.run()
        traces.append(simulation.trace())
    assert traces[0] == traces[1]
    other = Simulation(8)
    other.run()
    assert other.trace() != traces[0]


def test_without_faults_nobody_is_fenced() -> None:
    simulation = Simulation(3, faults=Faults(0, 0, 0, 0, 0, 0.0))
    simulation.run(quiet_ms=5_000)
    assert simulation.registry.fences == 0
    assert simulation.log.fenced == 0


class LogWithoutFence(LogState):
    """Takes an append of any epoch."""

    def append(self, append: Append) -> AppendOutcome:
        stream = self._streams.get(append.user)
        if stream is not None and append.epoch < stream.fence:
            head = Sequence(len(stream.events) + 1)
            append = dataclasses.replace(
                append,
                epoch=stream.fence,
                append_number=stream.last_append_number + 1,
                expected_sequence=head,
            )
        return super().append(append)


class LogWithoutExpectedSequence(LogState):
    """Takes the next append whatever the writer has seen, and repeats as if they were new."""

    def append(self, append: Append) -> AppendOutcome:
        stream = self._streams.get(append.user)
        if stream is not None:
            append = dataclasses.replace(
                append,
                append_number=stream.last_append_number + 1,
                expected_sequence=Sequence(len(stream.events) + 1),
            )
        return super().append(append)


class LogThatTellsBeforeItStores(LogState):
    """Answers "committed" for an append that is lost, now and then."""

    def append(self, append: Append) -> AppendOutcome:
        if append.append_number % 5 == 4:
            return Committed(Sequence(append.expected_sequence + len(append.events)))
        return super().append(append)


class LogThatReadsBeforeItSeals(LogState):
    """Seals and reads in two steps: an append of the old manager comes between."""

    def seal(self, seal: Seal) -> SealOutcome:
        outcome = super().seal(seal)
        if isinstance(outcome, Sealed) and outcome.next_sequence > 1:
            return dataclasses.replace(outcome, next_sequence=Sequence(outcome.next_sequence - 1))
        return outcome


@pytest.mark.parametrize(
    "broken",
    [
        LogWithoutFence,
        LogWithoutExpectedSequence,
        LogThatTellsBeforeItStores,
        LogThatReadsBeforeItSeals,
    ],
)
def test_a_removed_guard_breaks_an_invariant(broken: type[LogState]) -> None:
    for seed in SEEDS_TO_FIND:
        try:
            Simulation(seed, log=broken).run()
        except InvariantBroken as found:
            assert f"seed {seed}" in str(found)
            return
    pytest.fail(f"{broken.__name__} was not found in {len(SEEDS_TO_FIND)} seeds")
