"""`make failover`: kills the node that has all users, again and again, and measures the pause.

    python -m tests.load.failover [--kills 200] [--users 50] [--edges 1] [--json FILE]

A cluster of its own with two agent nodes. Every user has a run in flight all the time; the
node that holds them is killed with SIGKILL, and the time from the kill to each user's
`manager_moved` on its socket is the figure. Then `up` starts the node again, and the
other one is next. At the end every stream is checked whole: one broken rule and the
exit code is 1. About 4 s for each kill.
"""

import argparse
import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.progress import Progress

from steward.testing.local_cluster import LocalCluster
from tests.load.crowd import Crowd, percentile, play, report, wait_until

LATE_S = 15.0
HEALED_S = 60.0


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
            healed = asyncio.to_thread(cluster.wait_healed)
            await asyncio.wait_for(healed, HEALED_S)
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load.failover", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--edges", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    found = play(
        lambda cluster, progress: measure(cluster, arguments.users, arguments.kills, progress),
        edges=arguments.edges,
    )
    values = found.pop("values")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2))
    report(
        f"{found['kills']} kills of a node with {found['users']} busy users: next event after "
        f"p50 {found['p50_ms']:.0f}, p90 {found['p90_ms']:.0f}, p99 {found['p99_ms']:.0f}, "
        f"max {found['max_ms']:.0f} ms ({found['pauses']} pauses, {found['missed']} missed)",
        found,
        values,
    )
    return 1 if found["findings"] or found["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
