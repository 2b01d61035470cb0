"""`run_alone`: the command line of a measuring module, for when only that one is wanted."""

import argparse
from collections.abc import Callable, Sequence

from tests.load.machine import facts, load
from tests.load.rows import Row, text_table

ROUNDS = 3


def run_alone(figures: Callable[[int, bool], Sequence[Row]], description: str | None) -> None:
    """Parse `--rounds` and `--quick`, measure, and print a table."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"of each measurement ({ROUNDS})"
    )
    parser.add_argument("--quick", action="store_true", help="less of each, to look")
    options = parser.parse_args()
    print(f"{facts()}, load before the start {load():.1f}")
    print(text_table(figures(options.rounds, options.quick)))
