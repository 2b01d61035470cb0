"""Many users who are always busy, each on one raw WebSocket, for fault measurements.

Each member sends a message, follows its run to the end, and sends the next. Every frame
is kept with the time at which it came; `findings` checks the whole stream of each member
(sequences without gap or repeat, one start and one end per run, tool calls in pairs) so
that no figure is taken from a broken stream. A member repairs nothing: its socket is
meant to stay open through whatever is done to the nodes.
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import Progress

from steward.client.checks import check_stream
from steward.model.keys import DEFAULT_TENANT, UserKey
from steward.rpc.keys import USER_KEY, load_or_create_key
from steward.testing.local_cluster import LocalCluster
from steward.testing.tab import Tab, open_tab
from steward.tokens import mint
from tests.load import machine

AGENTS = Path(__file__).parent / "agents.py"
RUN_S = 60.0
TOKEN_S = 86_000


@dataclass(frozen=True, slots=True)
class Move:
    """One `manager_moved` as a member saw it. `at` is on `time.monotonic`; `pause_s` is the time
    between the event before it and it."""

    user: str
    at: float
    pause_s: float
    data: dict[str, Any]


@dataclass
class Member:
    """One user. `runs` counts those that ended, by outcome."""

    user: str
    tab: Tab
    runs: dict[str, int] = field(default_factory=dict)
    _moves: list[Move] = field(default_factory=list)
    _looked_at: int = 0

    async def work(self, content: str, agent: str, enough: asyncio.Event) -> None:
        """Send messages one after the other until `enough`; the last run is followed to its end."""
        number = 0
        while not enough.is_set():
            number += 1
            end = await self.tab.ask(f"m{number}", content, RUN_S, agent=agent)
            # The events are checked at the end; what else came is not needed again.
            self.tab.frames.clear()
            self.tab.texts.clear()
            outcome = end["data"]["outcome"]
            self.runs[outcome] = self.runs.get(outcome, 0) + 1

    def moves(self) -> list[Move]:
        """Every `manager_moved` so far; each event is looked at once."""
        events, at = self.tab.events, self.tab.at
        for index in range(self._looked_at, len(events)):
            if events[index]["type"] == "manager_moved":
                before = at[index - 1] if index else at[index]
                data = events[index]["data"]
                self._moves.append(Move(self.user, at[index], at[index] - before, data))
        self._looked_at = len(events)
        return self._moves

    def findings(self) -> list[str]:
        """What is wrong with the stream of this member; empty when nothing is."""
        events = self.tab.events
        first = self.tab.ready["sequence"] + 1
        numbers = [event["sequence"] for event in events]
        found = [str(finding) for finding in check_stream(events)]
        if numbers != list(range(first, first + len(events))):
            found.append(f"{self.user}: the sequences are not {first} to {first + len(events) - 1}")
        return [f"{self.user}: {text}" for text in found]


class Crowd:
    """Members on one cluster, spread over its edges. Use with `async with`."""

    def __init__(self, cluster: LocalCluster, users: int, content: str, agent: str) -> None:
        self._cluster = cluster
        self._names = [f"crowd-{number}" for number in range(users)]
        self._content = content
        self._agent = agent
        self._enough = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.members: list[Member] = []

    async def __aenter__(self) -> "Crowd":
        connector = aiohttp.TCPConnector(limit=0)
        self._http = aiohttp.ClientSession(connector=connector)
        urls = self._cluster.urls
        # Not by `steward token`: many take so long that who waits unread would be given up.
        key = load_or_create_key(self._cluster.data, USER_KEY)
        for index, name in enumerate(self._names):
            token = mint(key, UserKey(DEFAULT_TENANT, name), TOKEN_S)
            tab = await open_tab(self._http, urls[index % len(urls)], token)
            self.members.append(Member(name, tab))
        for member in self.members:
            self._tasks.append(
                asyncio.create_task(member.work(self._content, self._agent, self._enough))
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.close()

    async def finish(self) -> None:
        """Let every member end the run that it follows. Raises what a member met."""
        self._enough.set()
        await asyncio.gather(*self._tasks)

    def check(self) -> None:
        """Raise what has ended a member too early: a socket that was closed, a run that hangs."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    def homes(self) -> dict[str, int]:
        """How many members each node has, as their last events say."""
        homes: dict[str, int] = {}
        for member in self.members:
            moves = member.moves()
            home = moves[-1].data["to_node"] if moves else member.tab.ready["manager"]["node_id"]
            homes[home] = homes.get(home, 0) + 1
        return homes

    def moves_since(self, at: float) -> list[Move]:
        return [move for member in self.members for move in member.moves() if move.at >= at]

    def findings(self) -> list[str]:
        return [text for member in self.members for text in member.findings()]

    def outcomes(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for member in self.members:
            for outcome, count in member.runs.items():
                total[outcome] = total.get(outcome, 0) + count
        return total


Measure = Callable[[LocalCluster, Progress], Coroutine[None, None, dict[str, Any]]]


def play(
    measure: Measure, *options: str, edges: int = 1, environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Start a cluster with the agent `worker`, measure on it, and end it, with a progress bar.

    Its logs go to stderr when the measurement fails.
    """
    with tempfile.TemporaryDirectory(prefix="steward-load-") as folder:
        cluster = LocalCluster.start(
            Path(folder), f"--agent={AGENTS}:worker", *options, edges=edges, environ=environ
        )
        try:
            cluster.wait_ready()
            with Progress(console=Console(stderr=True)) as progress:
                return asyncio.run(measure(cluster, progress))
        except BaseException:
            sys.stderr.write(cluster.logs())
            raise
        finally:
            cluster.end()


def report(text: str, found: dict[str, Any], values_ms: Sequence[float]) -> None:
    """Print a measurement: the machine, what was found, its plot, and what is broken."""
    print(machine.facts())
    print(text)
    print(histogram(values_ms))
    print(f"runs: {found['outcomes']}")
    for broken in found["findings"][:20]:
        print(f"BROKEN {broken}")
    print(f"{len(found['findings'])} broken rules in all streams")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of `values` does not exceed; 0 for none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def histogram(values_ms: Sequence[float], unit: str = "ms", bars: int = 12) -> str:
    """A plot for a terminal: one line per bucket, each twice as wide as the one before."""
    if not values_ms:
        return "(nothing was measured)"
    edges = [2.0**power for power in range(1, 14)]
    counts = [0] * (len(edges) + 1)
    for value in values_ms:
        counts[next((i for i, edge in enumerate(edges) if value <= edge), len(edges))] += 1
    first = next(i for i, count in enumerate(counts) if count)
    last = max(i for i, count in enumerate(counts) if count)
    most = max(counts)
    lines = []
    for index in range(first, last + 1):
        name = f"<= {edges[index]:.0f}" if index < len(edges) else f"> {edges[-1]:.0f}"
        bar = "#" * max(round(40 * counts[index] / most), 1 if counts[index] else 0)
        lines.append(f"  {name:>8} {unit} {counts[index]:>7} {bar}")
    return "\n".join(lines)


async def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    """Poll a condition of the outside world. Raises TimeoutError that names it."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        await asyncio.sleep(0.02)
