"""`make rolling`: restarts all nodes one after the other under users with runs in flight.

    python -m tests.load.rolling [--users 200] [--rounds 1] [--agents 3] [--json FILE]

Each node gets SIGTERM, which is a drain: its users are moved, with their runs, to the
others, and `up` starts it again. What counts: every socket stays open, every stream is
whole (checked at the end, rule by rule), every run ends with success, and the pause of
each user, as its `manager_moved.gap_ms` says and as its socket saw it.
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

DRAINED_S = 60.0
HEALED_S = 60.0


async def measure(
    cluster: LocalCluster, users: int, rounds: int, progress: Progress
) -> dict[str, Any]:
    """Restart every node `rounds` times; the gaps of all moves in ms and what the streams say."""
    nodes = [name for name, entry in cluster.processes.items() if entry["role"] == "agent"]
    task = progress.add_task("restarts", total=rounds * len(nodes))
    began = time.monotonic()
    drains: list[float] = []
    async with Crowd(cluster, users, "20 250", "worker") as crowd:
        await asyncio.sleep(2.0)
        for node in nodes * rounds:
            at = time.monotonic()
            pid = await asyncio.to_thread(cluster.kill, node, signal.SIGTERM)
            await wait_until(lambda pid=pid: not _runs(pid), DRAINED_S, f"{node} has ended")
            drains.append(time.monotonic() - at)
            await asyncio.wait_for(asyncio.to_thread(cluster.wait_healed), HEALED_S)
            crowd.check()
            progress.update(task, advance=1)
        await crowd.finish()
        moves = crowd.moves_since(began)
        gaps = [float(move.data["gap_ms"]) for move in moves]
        pauses = [move.pause_s * 1000 for move in moves]
        return {
            "restarts": rounds * len(nodes),
            "users": users,
            "moves": len(moves),
            "handoffs": sum(move.data["cause"] == "handoff" for move in moves),
            "drain_s_max": max(drains),
            "gap_p50_ms": percentile(gaps, 0.50),
            "gap_p99_ms": percentile(gaps, 0.99),
            "gap_max_ms": max(gaps, default=0.0),
            "silence_p99_ms": percentile(pauses, 0.99),
            "outcomes": crowd.outcomes(),
            "findings": crowd.findings(),
            "gaps": gaps,
        }


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load.rolling", description=__doc__)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--agents", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    found = play(
        lambda cluster, progress: measure(cluster, arguments.users, arguments.rounds, progress),
        "--agents",
        str(arguments.agents),
    )
    gaps = found.pop("gaps")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2))
    report(
        f"{found['restarts']} nodes restarted under {found['users']} users with runs in flight: "
        f"{found['moves']} moves, {found['handoffs']} of them planned; manager_moved.gap_ms "
        f"p50 {found['gap_p50_ms']:.0f}, p99 {found['gap_p99_ms']:.0f}, "
        f"max {found['gap_max_ms']:.0f}; longest drain {found['drain_s_max']:.1f} s",
        found,
        gaps,
    )
    return 1 if found["findings"] or set(found["outcomes"]) != {"success"} else 0


if __name__ == "__main__":
    sys.exit(main())
