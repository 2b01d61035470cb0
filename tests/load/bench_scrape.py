"""What watching costs: a scrape of an edge with many connections, and the measures of one batch.

    python -m tests.load.bench_scrape [--rounds 5] [--quick]

The edge is the real process (`edge_rig`), every connection of a user of its own. A scrape is
what Prometheus sends, OpenMetrics asked for; its time is that of the whole answer, and its CPU
that of the edge. The measures of a batch are timed in this process, by CPU.
"""

import time
import urllib.request

from prometheus_client import CollectorRegistry

from edge.host.timing import DeliveryTimes
from steward.telemetry.catalog import EdgeMetrics
from tests.load.alone import run_alone
from tests.load.edge_clients import Clients
from tests.load.edge_rig import Rig
from tests.load.rows import Row

ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
FEW = 50
SETTLED_S = 1.5
SCRAPES = 20
BATCHES = 20_000
GOAL_MS = 20.0


def figures(rounds: int, quick: bool) -> list[Row]:
    """All rows. `quick` opens fewer connections, in about 5 s."""
    many = 1_000 if quick else 10_000
    with Rig() as rig, Clients(rig.port) as clients:
        clients.open(rig.tokens([f"few{number}" for number in range(FEW)]))
        few_ms = [_scrape(rig)[0] for _ in range(rounds)]
        clients.open(rig.tokens([f"u{number}" for number in range(many - FEW)]))
        time.sleep(SETTLED_S)
        with_many = [_scrape(rig) for _ in range(rounds)]
        rig.check()
    what = "edge: a scrape at"
    return [
        Row(f"{what} {FEW} connections", "ms", few_ms, lower_is_better=True),
        Row(
            f"{what} {many:,} connections",
            "ms",
            [took for took, _ in with_many],
            goal=GOAL_MS,
            lower_is_better=True,
        ),
        Row(
            f"edge: CPU of a scrape at {many:,} connections",
            "ms",
            [cpu for _, cpu in with_many],
            goal=GOAL_MS,
            lower_is_better=True,
        ),
        Row(
            "edge: CPU of all measures of one batch",
            "µs",
            [_measures() for _ in range(rounds)],
            lower_is_better=True,
        ),
    ]


def _scrape(rig: Rig) -> tuple[float, float]:
    """The median time and the CPU of one scrape, in milliseconds."""
    took = []
    url = f"http://127.0.0.1:{rig.ops}/metrics"
    request = urllib.request.Request(url, headers={"Accept": ACCEPT})
    with rig.cpu() as spent:
        for _ in range(SCRAPES):
            began = time.perf_counter()
            request = urllib.request.Request(
                f"http://127.0.0.1:{rig.ops}/metrics", headers={"Accept": ACCEPT}
            )
            with urllib.request.urlopen(request, timeout=10) as answer:
                page = answer.read()
            took.append((time.perf_counter() - began) * 1000)
            assert b"steward_edge_connections" in page and page.endswith(b"# EOF\n")
    return sorted(took)[len(took) // 2], spent() * 1000 / SCRAPES


def _measures() -> float:
    """CPU in microseconds of what is done for one batch, whatever number of events it has."""
    metrics = EdgeMetrics(CollectorRegistry())
    times = DeliveryTimes(metrics)
    oldest_us = time.time_ns() // 1000
    began = time.process_time()
    for _ in range(BATCHES):
        times.batch_came(oldest_us)
        times.batch_out(None, 0)
        metrics.delivery_seconds.observe(0.001)
        times.written()
    return (time.process_time() - began) * 1e6 / BATCHES


if __name__ == "__main__":
    run_alone(figures, __doc__)
