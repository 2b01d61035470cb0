"""What a person sees of a load while it runs, and of what it found."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from steward.load.generator import Found, Watcher
from steward.load.histogram import Histogram
from steward.load.plan import LoadPlan
from steward.load.processes import cpu_seconds

SHARES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999))


class LoadView(Watcher):
    """A bar on stderr, and the CPU time of the cluster's processes while the load lasts."""

    def __init__(self, plan: LoadPlan, pids: Mapping[str, int]) -> None:
        self._plan = plan
        self._pids = pids
        self._cpu: dict[str, float] = {}
        self._begin = self._shown = 0.0
        self._events = 0
        self._latency = Histogram()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
            console=Console(stderr=True),
        )
        self._connecting = self._bar.add_task("connecting", total=plan.connections, now="")
        self._loading = self._bar.add_task("load", total=plan.seconds, now="", start=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def up(self, connections: int) -> None:
        self._bar.advance(self._connecting, connections)

    def begins(self) -> None:
        self._cpu = self._cpu_now()
        self._begin = self._shown = time.monotonic()
        self._bar.start_task(self._loading)

    def progress(self, found: Found, events: int, latency: Histogram) -> None:
        self._events += events
        self._latency.merge(latency)
        now = time.monotonic()
        if now - self._shown < 1:
            return
        rate = self._events / (now - self._shown)
        last = self._latency.take()
        p50, p99 = last.percentile(0.5), last.percentile(0.99)
        text = f"{rate:,.0f} events/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms, in order"
        self._bar.update(
            self._loading, completed=min(now - self._begin, self._plan.seconds), now=text
        )
        self._shown, self._events = now, 0

    def ended(self) -> None:
        after = self._cpu_now()
        self._cpu = {name: after[name] - self._cpu[name] for name in after if name in self._cpu}
        self._bar.update(self._loading, completed=self._plan.seconds)

    def costs(self, events: int) -> dict[str, float]:
        """CPU microseconds per event by process; one that died meanwhile is left out."""
        return {name: cpu_s / events * 1e6 for name, cpu_s in self._cpu.items()} if events else {}

    def _cpu_now(self) -> dict[str, float]:
        cpu: dict[str, float] = {}
        for name, pid in self._pids.items():
            with suppress(OSError):
                cpu[name] = cpu_seconds(pid)
        return cpu


def print_json(plan: LoadPlan, found: Found, costs: Mapping[str, float]) -> None:
    """One object on stdout. Times are in the unit that their name ends with."""
    latency = {name: round(found.latency.percentile(share), 3) for name, share in SHARES}
    content = {
        "users": len(plan.users),
        "connections": plan.connections,
        "edges": len(plan.addresses),
        "workers": plan.workers,
        "rate_asked": plan.rate or None,
        "connect_s": round(found.connect_s, 3),
        "seconds": round(found.seconds, 3),
        "events": found.events,
        "events_per_s": round(found.events_per_s, 1),
        "frames": found.frames,
        "latency_ms": latency | {"max": found.latency.most / 1000},
        "cpu_us_per_event": {name: round(cost, 2) for name, cost in costs.items()},
        "client_cpu_us_per_frame": round(found.client_cpu_s / max(found.frames, 1) * 1e6, 2),
    }
    print(json.dumps(content, indent=2))


def print_table(plan: LoadPlan, found: Found, costs: Mapping[str, float]) -> None:
    """A table on stdout."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    asked = f"{plan.rate:,.0f} events/s asked" if plan.rate else "as many as they can"
    tabs = f", {plan.tabs} tabs each" if plan.tabs > 1 else ""
    rate = found.frames / found.seconds
    for what, value in (
        ("load", f"{len(plan.users):,} users{tabs}; {asked}"),
        (
            "durable events",
            f"{found.events:,} in {found.seconds:.1f} s: {found.events_per_s:,.0f}/s",
        ),
        ("frames, each checked", f"{found.frames:,}: {rate:,.0f}/s"),
        *(
            (f"verb to socket, {name}", f"{found.latency.percentile(share):,.2f} ms")
            for name, share in SHARES
        ),
        ("verb to socket, most", f"{found.latency.most / 1000:,.2f} ms"),
        *((f"CPU per event, {name}", f"{cost:,.1f} µs") for name, cost in costs.items()),
        ("CPU per frame, this load", f"{found.client_cpu_s / found.frames * 1e6:,.1f} µs"),
    ):
        table.add_row(what, value)
    Console().print(table)
