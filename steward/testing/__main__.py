"""`python -m steward.testing --seed S --count N`: play N seeds from S on, with a progress line.

A seed that breaks an invariant is printed with the one line that plays it again; exit code 1.
"""

import argparse
import sys
import time

from steward.testing.invariants import InvariantBroken
from steward.testing.simulation import Simulation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m steward.testing", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="first seed")
    parser.add_argument("--count", type=int, default=100, help="how many seeds")
    arguments = parser.parse_args()
    started, steps, broken = time.monotonic(), 0, 0
    for number in range(arguments.count):
        simulation = Simulation(arguments.seed + number)
        try:
            simulation.run()
        except InvariantBroken as found:
            broken += 1
            print(f"\n{found}\n  again: make simulate SEED={simulation.seed} N=1")
        steps += simulation.world.steps
        took_s = time.monotonic() - started
        line = f"{number + 1}/{arguments.count} seeds, {steps:,} steps, {steps / took_s:,.0f}/s"
        print(f"\r{line}, {broken} broken", end="", file=sys.stderr)
    print(file=sys.stderr)
    print(f"{arguments.count} seeds, {steps} steps, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
