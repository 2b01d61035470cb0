"""Each guard of the protocol, taken away, breaks an invariant within a bounded number of seeds."""

import pytest

from steward.testing.invariants import InvariantBroken
from steward.testing.mutations import GUARDS

MOST_SEEDS = 60

BROKEN = {
    "fence": {"S"},
    "expected-sequence": {"I3"},
    "atomic-seal": {"I3"},
    "append-before-deliver": {"I4"},
    "intent-before-tool": {"I6"},
    "edge-epoch": {"I5"},
    "self-fencing": {"I9"},
    "guarded-commit": {"I8"},
    "unknown-result": {"I2", "I8"},
    "compare-and-delete": {"I8"},
}


def test_the_ten_guards_of_the_protocol_have_a_mutation() -> None:
    assert set(GUARDS) == set(BROKEN)


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_removed_guard_breaks_its_invariant(name: str) -> None:
    for seed in range(1, MOST_SEEDS + 1):
        try:
            GUARDS[name].simulation(seed).run()
        except InvariantBroken as found:
            assert found.name in BROKEN[name]
            assert f"seed {seed}, step" in str(found)
            return
    pytest.fail(f"nothing broke without {name} in {MOST_SEEDS} seeds")
