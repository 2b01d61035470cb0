"""The command `steward`, run as an operator runs it: a process of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping

STEWARD = (sys.executable, "-c", "import sys; from steward.cli.main import main; sys.exit(main())")
"""What to start; its words follow."""


def run_steward(
    *words: object, environ: Mapping[str, str] | None = None, within_s: float = 60
) -> "subprocess.CompletedProcess[str]":
    """Run it to its end, whatever that is; `environ` instead of this process's environment."""
    return subprocess.run(
        [*STEWARD, *map(str, words)],
        env=os.environ if environ is None else environ,
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )
