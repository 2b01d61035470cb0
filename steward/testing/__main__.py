"""`python -m steward.testing --seed S --count N`: play N seeds from S on, with a progress line.

A seed that breaks an invariant is printed with the one line that plays it again; exit code 1.
`--trace` prints the last steps of such a seed too. `--without GUARD` plays with one guard of the
protocol missing, `--list` names the guards.
"""

import argparse
import sys
import time
from collections import Counter

from steward.testing.invariants import NAMES, InvariantBroken
from steward.testing.mutations import GUARDS
from steward.testing.simulation import TENANTS, Simulation

TRACED_STEPS = 60


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m steward.testing", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="first seed")
    parser.add_argument("--count", type=int, default=100, help="how many seeds")
    parser.add_argument("--without", choices=list(GUARDS), help="play with this guard missing")
    parser.add_argument("--list", action="store_true", help="print the guards, and end")
    parser.add_argument("--trace", action="store_true", help="print what led to a break")
    arguments = parser.parse_args()
    if arguments.list:
        for name, guard in GUARDS.items():
            print(f"{name:<24} {guard.text}")
        return 0
    make = GUARDS[arguments.without].simulation if arguments.without else Simulation
    started, steps = time.process_time(), 0
    broken: Counter[str] = Counter()
    checks: Counter[str] = Counter(dict.fromkeys(NAMES, 0))
    overlaps: dict[str, list[int]] = {tenant: [] for tenant in TENANTS}
    for number in range(arguments.count):
        simulation = make(arguments.seed + number)
        try:
            simulation.run()
        except InvariantBroken as found:
            broken[found.name] += 1
            without = f" WITHOUT={arguments.without}" if arguments.without else ""
            print(f"\n{found}\n  again: {simulation.again()}{without}\n  {simulation.faults}")
            if arguments.trace:
                print("\n".join(simulation.world.notes(TRACED_STEPS)))
        steps += simulation.world.steps
        checks += simulation.invariants.counts
        for tenant, found_ms in overlaps.items():
            found_ms.extend(simulation.invariants.overlaps_ms(tenant))
        took_s = max(time.process_time() - started, 0.001)
        line = f"{number + 1}/{arguments.count} seeds, {steps:,} steps, {steps / took_s:,.0f}/s"
        if sys.stderr.isatty():
            print(f"\r{line}, {broken.total()} broken", end="", file=sys.stderr)
    print(f"{line}, {broken.total()} broken {dict(broken) or ''}")
    print("checks:", ", ".join(f"{name} {checks[name]:,}" for name in NAMES))
    for tenant, found_ms in overlaps.items():
        print(f"a stale manager acted beside the next one, tenant {tenant!r}: {_spread(found_ms)}")
    return 1 if broken else 0


def _spread(found_ms: list[int]) -> str:
    if not found_ms:
        return "never"
    found_ms.sort()
    return (
        f"{len(found_ms)} times, for {found_ms[len(found_ms) // 2]} ms in the median and "
        f"{found_ms[-1]} ms at most (virtual time; none of it was stored or shown)"
    )


if __name__ == "__main__":
    sys.exit(main())
