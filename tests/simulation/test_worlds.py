"""The real cores under seeded faults: no invariant breaks, and the same seed is the same world."""

from collections import Counter

import pytest

from steward.testing.faults import Faults
from steward.testing.invariants import NAMES, InvariantBroken
from steward.testing.simulation import Simulation

SEEDS_AT_ONCE = 25


@pytest.mark.parametrize("first", range(1, 151, SEEDS_AT_ONCE))
def test_no_fault_breaks_an_invariant(first: int) -> None:
    fences = refused = 0
    checks: Counter[str] = Counter()
    for seed in range(first, first + SEEDS_AT_ONCE):
        simulation = Simulation(seed)
        simulation.run()
        fences += simulation.registry.fences
        refused += simulation.log.fenced
        checks += simulation.invariants.counts
    assert fences > SEEDS_AT_ONCE, "the faults must have struck"
    assert refused, "some manager must have written too late"
    unchecked = [name for name in NAMES if not checks[name]]
    assert unchecked == [], "a check that never ran proves nothing"


def test_every_fault_at_once_breaks_no_invariant() -> None:
    fences = 0
    for seed in range(1_001, 1_011):
        simulation = Simulation(seed, faults=Faults())
        simulation.run()
        fences += simulation.registry.fences
    assert fences > 10


def test_the_same_seed_gives_the_same_steps() -> None:
    traces = []
    for seed in (7, 7, 8):
        simulation = Simulation(seed)
        simulation.run()
        traces.append((simulation.trace(), simulation.world.notes(500)))
    assert traces[0] == traces[1]
    assert traces[2] != traces[0]


def test_the_mix_of_faults_depends_on_the_seed_alone() -> None:
    assert Faults.of(5) == Faults.of(5)
    mixes = {str(Faults.of(seed)) for seed in range(50)}
    assert len(mixes) > 45
    for name in ("node_kill_ms", "partition_ms", "restore_ms", "clock_drift", "slow_log"):
        values = {getattr(Faults.of(seed), name) > 0 for seed in range(50)}
        assert values == {True, False}, name


def test_without_faults_nobody_is_fenced() -> None:
    simulation = Simulation(3, faults=Faults.none())
    simulation.run(busy_ms=5_000)
    assert simulation.registry.fences == 0
    assert simulation.log.fenced == 0


def test_what_is_found_names_the_seed_the_invariant_and_the_way_back() -> None:
    simulation = Simulation(3, faults=Faults.none())
    simulation._begin()
    simulation.world.run(3_000)
    client = simulation.clients[0]
    with pytest.raises(InvariantBroken, match="I4: user-0/0 saw 999") as found:
        simulation.invariants.shown(client.name, client.user, 999, [b"{}"])
    assert found.value.name == "I4"
    assert simulation.again() == "make simulate SEED=3 N=1"
    notes = simulation.world.notes(500)
    assert any("begins under" in note for note in notes)
