"""`make failover`: kills the node that has all users, again and again, and measures the pause.

    python -m tests.load.failover [--kills 200] [--users 50] [--edges 1] [--json FILE]
        [--log sqlite|postgresql] [--registry sqlite|etcd]

A cluster of its own with two agent nodes; its log and its registry are on SQLite, or on real
servers that are started beside it (etcd: three members). Every user has a run in flight all
the time; the node that holds them is killed with SIGKILL, and the time from the kill to each
user's `manager_moved` on its socket is the figure. Then `up` starts the node again, and the
other one is next. At the end every stream is checked whole: one broken rule and the
exit code is 1. About 4 s for each kill.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.progress import Progress

from steward.testing.etcd import EtcdCluster
from steward.testing.local_cluster import LocalCluster
from steward.testing.postgres import PostgresServer
from steward.testing.waiting import wait_for
from tests.load.crowd import Crowd, percentile, play, report, wait_until

LATE_S = 15.0
HEALED_S = 180.0
"""A process that starts again is less important than those that run: on a busy machine it waits."""


async def measure(
    cluster: LocalCluster, users: int, kills: int, progress: Progress
) -> dict[str, Any]:
    """Kill `kills` nodes under `users` busy users; pauses in ms and what the streams say.

    SIGINT ends it after the kill at hand, with the figures of those that were done.
    """
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    pauses: list[float] = []
    misses = 0
    task = progress.add_task("kills", total=kills)
    async with Crowd(cluster, users, "12 120", "worker") as crowd:
        await asyncio.sleep(1.0)
        done = 0
        while done < kills and not stop.is_set():
            done += 1
            homes = crowd.homes()
            victim = max(homes, key=lambda name: homes[name])
            at = time.monotonic()
            await asyncio.to_thread(cluster.kill, victim, signal.SIGKILL)

            def arrived(at: float = at, victim: str = victim) -> set[str]:
                moves = crowd.moves_since(at)
                return {m.user for m in moves if m.data["from_node"] == victim}

            expected = homes[victim]
            try:
                await wait_until(
                    lambda arrived=arrived, n=expected: len(arrived()) >= n, LATE_S, "all moved"
                )
            except TimeoutError:
                misses += expected - len(arrived())
            crowd.check()
            moves = [m for m in crowd.moves_since(at) if m.data["from_node"] == victim]
            pauses += [(m.at - at) * 1000 for m in moves]
            await asyncio.to_thread(wait_for, cluster.all_ready, HEALED_S, "all are ready again")
            if not progress.console.is_terminal and done % 10 == 0:
                print(f"{done} kills, p99 {percentile(pauses, 0.99):.0f} ms", file=sys.stderr)
            progress.update(
                task,
                advance=1,
                description=f"kills  p50 {percentile(pauses, 0.5):.0f}"
                f" p99 {percentile(pauses, 0.99):.0f} ms",
            )
        await crowd.finish()
        return {
            "kills": done,
            "users": users,
            "pauses": len(pauses),
            "missed": misses,
            "p50_ms": percentile(pauses, 0.50),
            "p90_ms": percentile(pauses, 0.90),
            "p99_ms": percentile(pauses, 0.99),
            "max_ms": max(pauses, default=0.0),
            "outcomes": crowd.outcomes(),
            "findings": crowd.findings(),
            "values": pauses,
        }


@contextmanager
def engines(log: str, registry: str) -> Iterator[dict[str, str]]:
    """Start the servers of these stores; the environment of a cluster that uses them."""
    environ: dict[str, str] = {}
    with ExitStack() as servers:
        if log == "postgresql":
            postgres = PostgresServer()
            servers.callback(postgres.remove)
            postgres.start()
            environ["STEWARD_LOG_STORE"] = postgres.url(asyncio.run(postgres.make_database()))
        if registry == "etcd":
            folder = servers.enter_context(tempfile.TemporaryDirectory(prefix="steward-etcd-"))
            etcd = servers.enter_context(EtcdCluster(Path(folder)))
            environ["STEWARD_REGISTRY_STORE"] = f"etcd://{','.join(etcd.endpoints)}/failover"
        yield environ


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load.failover", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--edges", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--log", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--registry", choices=("sqlite", "etcd"), default="sqlite")
    arguments = parser.parse_args()
    with engines(arguments.log, arguments.registry) as environ:
        found = play(
            lambda cluster, progress: measure(cluster, arguments.users, arguments.kills, progress),
            edges=arguments.edges,
            environ=environ,
        )
    found["stores"] = {"log": arguments.log, "registry": arguments.registry}
    values = found.pop("values")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2))
    report(
        f"log on {arguments.log}, registry on {arguments.registry}: "
        f"{found['kills']} kills of a node with {found['users']} busy users: next event after "
        f"p50 {found['p50_ms']:.0f}, p90 {found['p90_ms']:.0f}, p99 {found['p99_ms']:.0f}, "
        f"max {found['max_ms']:.0f} ms ({found['pauses']} pauses, {found['missed']} missed)",
        found,
        values,
    )
    return 1 if found["findings"] or found["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
