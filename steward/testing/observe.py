"""`make observe`: Prometheus beside a `steward up` on this machine, until Ctrl-C.

    python -m steward.testing.observe [--data .steward] [--port 9090]

It scrapes the cluster that runs on the data directory, follows it when its processes change, and
evaluates the committed rules. Without a running cluster it waits for one. The dashboards
are in `deploy/observability/dashboards`, for a Grafana with this Prometheus as data source.
"""

import argparse
import json
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from steward.testing.prometheus import INSTALL, Prometheus, missing

RULES = Path(__file__).parents[2] / "deploy/observability"
EVERY_S = 5.0
LOOK_S = 2.0
EXIT_WRONG_USE = 2


def main() -> int:
    """Run until a signal; exit code 2 when Prometheus is not installed or its port is taken."""
    parser = argparse.ArgumentParser(prog="make observe", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(".steward"), help="that of `steward up`")
    parser.add_argument("--port", type=int, default=9090, help="where Prometheus listens")
    options = parser.parse_args()
    if shutil.which("prometheus") is None:
        print(f"steward: {missing()}", file=sys.stderr)
        print(f"steward: install it and run again. {INSTALL}", file=sys.stderr)
        return EXIT_WRONG_USE
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    try:
        prometheus = Prometheus.start(
            options.data / "prometheus", RULES, EVERY_S, port=options.port
        )
    except RuntimeError as error:
        print(f"steward: {error}", file=sys.stderr)
        return EXIT_WRONG_USE
    try:
        print(f"{prometheus.url}/targets", flush=True)
        return _follow(prometheus, options.data, stopping)
    finally:
        prometheus.end()


def _follow(prometheus: Prometheus, data: Path, stopping: threading.Event) -> int:
    known: list[dict[str, Any]] | None = None
    while not stopping.wait(0 if known is None else LOOK_S):
        if prometheus.process.poll() is not None:
            print("steward: Prometheus ended; its log is beside its data", file=sys.stderr)
            return 1
        processes = _processes(data)
        if processes != known:
            if not processes:
                print(f"waiting for a cluster on {data}: `make run`", file=sys.stderr)
            prometheus.scrape(processes)
            known = processes
    return 0


def _processes(data: Path) -> list[dict[str, Any]]:
    """Of the cluster file; none while there is none."""
    try:
        found: list[dict[str, Any]] = json.loads((data / "cluster.json").read_bytes())["processes"]
    except (OSError, ValueError, KeyError):
        return []
    return found


if __name__ == "__main__":
    sys.exit(main())
