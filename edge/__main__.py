"""`python -m edge`: the composition root of an edge."""

import os
import sys
from typing import NoReturn

from edge.server.service import EdgeService
from edge.server.workers import EdgeWorkers
from edge.settings import EdgeSettings
from steward.config.settings import SettingsError, load
from steward.runtime.service import run
from steward.telemetry.logs import configure


def main() -> NoReturn:
    """Read the settings, then run until stopped. Exit code 2 for what can't be used."""
    try:
        settings = load(EdgeSettings, sys.argv[1:], os.environ)
        configure(settings, "edge")
    except SettingsError as error:
        print(f"steward: {error}", file=sys.stderr)
        sys.exit(2)
    if settings.workers > 1:
        run(lambda: EdgeWorkers(settings, sys.argv[1:]), settings)
    run(lambda: EdgeService(settings), settings)


if __name__ == "__main__":
    main()
