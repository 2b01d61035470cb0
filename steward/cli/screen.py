"""What a person sees of a running cluster: a live table on a terminal, sparse lines elsewhere.

Numbers are sums over the ops ports. `users` counts a user once for each edge that has a
connection of it. Events per second are events that became durable since the last look.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

from steward.cli.supervisor import Child, ChildState

if TYPE_CHECKING:
    from rich.text import Text

PLAIN_EVERY_S = 60.0
EVENTS_METRIC = "steward_log_events_total"


@dataclass(frozen=True, slots=True)
class Totals:
    """The cluster in numbers."""

    users: int
    managers: int
    connections: int
    events: int
    events_per_s: float

    def __str__(self) -> str:
        return (
            f"{self.users} users, {self.managers} managers, {self.connections} connections, "
            f"{self.events} events, {self.events_per_s:.0f} events/s"
        )


class EventRate:
    """Events per second from a growing counter that falls to zero when its process restarts."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._last_time: float | None = None

    def update(self, now_s: float, counts: Mapping[str, float]) -> float:
        """The rate since the last update; 0 at the first. `counts` is by process id."""
        grown = sum(
            count - self._last[name] if count >= self._last.get(name, count + 1) else 0.0
            for name, count in counts.items()
        )
        passed = 0.0 if self._last_time is None else now_s - self._last_time
        self._last.update(counts)
        self._last_time = now_s
        return grown / passed if passed > 0 else 0.0


def totals_of(pages: Mapping[str, Mapping[str, float]], rate: float) -> Totals:
    """Add up the metrics of all processes (id → name → value)."""

    def total(name: str) -> int:
        return int(sum(page.get(name, 0.0) for page in pages.values()))

    return Totals(
        users=total("steward_edge_users"),
        managers=total("steward_agent_managers"),
        connections=total("steward_edge_connections"),
        events=total(EVENTS_METRIC),
        events_per_s=rate,
    )


class Screen(Protocol):
    """Where the state of the cluster is shown."""

    def announce(self, url: str) -> None:
        """Print the one result of `steward up` on stdout, a line of its own."""
        ...

    def say(self, line: str) -> None:
        """Show one line that stays."""
        ...

    def show(self, children: Sequence[Child], totals: Totals) -> None:
        """Show the present state."""
        ...

    def close(self) -> None:
        """Give the terminal back; lines can still be said. Safe to call twice."""
        ...


class PlainScreen:
    """Lines on stderr: what happens at once, numbers once a minute and only when they changed."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._next = time.monotonic() + PLAIN_EVERY_S
        self._last: Totals | None = None

    def announce(self, url: str) -> None:
        print(url, flush=True)

    def say(self, line: str) -> None:
        # A terminal that went away is no reason not to stop in order.
        with suppress(OSError):
            print(f"steward: {line}", file=self._out, flush=True)

    def show(self, children: Sequence[Child], totals: Totals) -> None:
        if time.monotonic() < self._next or totals == self._last:
            return
        self._next = time.monotonic() + PLAIN_EVERY_S
        self._last = totals
        ready = sum(child.state is ChildState.READY for child in children)
        self.say(f"{ready} of {len(children)} processes ready; {totals}")

    def close(self) -> None:
        pass


class LiveScreen:
    """A table that is drawn anew in place."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()

    def announce(self, url: str) -> None:
        self._print(url, "bold")

    def say(self, line: str) -> None:
        self._print(f"steward: {line}", "")

    def show(self, children: Sequence[Child], totals: Totals) -> None:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        numbers = Text.assemble(
            *_figure(totals.users, "users"),
            *_figure(totals.managers, "managers"),
            *_figure(totals.connections, "connections"),
            *_figure(round(totals.events_per_s), "events/s"),
        )
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("process", "state", "pid", "restarts", "address"):
            table.add_column(title, justify="right" if title in ("pid", "restarts") else "left")
        for child in children:
            spec = child.spec
            table.add_row(
                spec.id,
                _state(child),
                str(child.pid),
                str(child.restarts or ""),
                spec.http or spec.grpc or "",
            )
        hint = Text("Ctrl-C drains and stops; twice stops at once", style="dim")
        self._live.update(Group(Text(), numbers, Text(), table, Text(), hint), refresh=True)

    def close(self) -> None:
        with suppress(OSError):
            self._live.stop()

    def _print(self, line: str, style: str) -> None:
        from rich.text import Text

        # A Text is never read as markup; folded lines could not be copied.
        with suppress(OSError):
            self._console.print(Text(line, style=style), soft_wrap=True)


def _figure(value: int, what: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (f"{value}", "bold"), (f" {what}   ", "dim")


def _state(child: Child) -> "Text":
    from rich.text import Text

    styles = {ChildState.READY: "green", ChildState.WAITING: "red", ChildState.STARTING: "yellow"}
    return Text(child.state.value, style=styles.get(child.state, "dim"))


def make_screen() -> Screen:
    """A live table when stdout is a terminal, else plain lines on stderr."""
    return LiveScreen() if sys.stdout.isatty() else PlainScreen(sys.stderr)
