"""Service level objectives, and the recording rules that keep how much of each budget is spent.

An objective counts bad ones among all: requests refused by us, or latencies over a bound that is
a bucket of the histogram. For each there is a ratio of bad ones over seven windows
(`steward:slo_errors:ratio_rate5m` up to `...rate3d`), the budget, and the number of events.

Alerts burn over two windows each, a long one that says that it matters and a short one that says
that it still goes on: 14.4 times the budget over 1 h and 5 m, or 6 times over 6 h and 30 m, pages;
3 times over 1 d and 2 h, or once over 3 d and 6 h, warns. They keep quiet below `at_least` events
in an hour or a day: one slow failover of one user is not an outage.
"""

from dataclasses import dataclass

from steward.telemetry.instruments import FAST, SLOW
from steward.telemetry.promql import part, quantile, rate, series

WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
RATIO = "steward:slo_errors:ratio_rate"
BUDGET = "steward:slo_budget:ratio"
EVENTS = "steward:slo_events:increase"
SLI_P50 = "steward:sli_seconds:p50"
SLI_P99 = "steward:sli_seconds:p99"
# Factor of the budget, long window, short window, window in which events are counted.
FAST_BURNS = ((14.4, "1h", "5m", "1h"), (6.0, "6h", "30m", "1h"))
SLOW_BURNS = ((3.0, "1d", "2h", "1d"), (1.0, "3d", "6h", "1d"))

_FOR_US = "MANAGER_UNAVAILABLE|NO_CAPACITY|INTERNAL|STORE_UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Slo:
    """One objective. `counter`: bad ones by labels; else `histogram` with `bound` in seconds."""

    name: str
    promise: str
    target: float
    at_least: int
    histogram: str = ""
    bound: float = 0.0
    counter: str = ""
    bad: tuple[tuple[str, str], ...] = ()
    of: tuple[tuple[str, str], ...] = ()

    @property
    def budget(self) -> float:
        """The part that may be bad."""
        return round(1 - self.target, 6)

    @property
    def title(self) -> str:
        """As a part of names of alerts."""
        return "".join(word.capitalize() for word in self.name.split("_"))

    def events(self, window: str, function: str = "rate") -> str:
        """All of them per second; with `increase`, in the window."""
        if self.histogram:
            return f"sum({function}({part(self.histogram, 'count')}[{window}]))"
        return f"sum({function}({series(self.counter, **dict(self.of))}[{window}]))"

    def ratio(self, window: str) -> str:
        """Bad ones among all. NaN while there are none at all."""
        if self.histogram:
            good = part(self.histogram, "bucket", le=str(self.bound))
            return f"1 - (sum(rate({good}[{window}])) / {self.events(window)})"
        return f"{rate(self.counter, window, **dict(self.bad))} / {self.events(window)}"


SLOS = (
    Slo(
        "connect",
        "of handshakes are not refused for a reason on our side",
        0.999,
        100,
        counter="steward_edge_handshakes_total",
        bad=(("result", _FOR_US),),
    ),
    Slo(
        "attach",
        "of connections are ready within 500 ms",
        0.99,
        100,
        "steward_edge_attach_seconds",
        0.5,
    ),
    Slo(
        "first_event",
        "of messages show the first event of their run within 500 ms",
        0.99,
        100,
        "steward_edge_first_event_seconds",
        0.5,
    ),
    Slo(
        "append",
        "of appends are durable within 250 ms",
        0.999,
        100,
        "steward_agent_append_seconds",
        0.25,
    ),
    Slo(
        "delivery",
        "of batches are in the sockets within 100 ms after the append of their oldest event",
        0.999,
        100,
        "steward_edge_append_to_socket_seconds",
        0.1,
    ),
    Slo(
        "resume",
        "of connections that come back go on where they were",
        0.999,
        100,
        counter="steward_edge_resumes_total",
        bad=(("resume", "reset"),),
        of=(("resume", "resumed|reset"),),
    ),
    Slo(
        "failover",
        "of users have a manager again within 2 s after their node died",
        0.99,
        20,
        "steward_agent_failover_gap_seconds",
        2.0,
    ),
    Slo(
        "handoff",
        "of users have a manager again within 500 ms in a planned move",
        0.99,
        20,
        "steward_agent_handoff_gap_seconds",
        0.5,
    ),
)

SLIS = {
    "resolve": "steward_registry_resolve_seconds",
    "attach": "steward_edge_attach_seconds",
    "first_event": "steward_edge_first_event_seconds",
    "append": "steward_agent_append_seconds",
    "append_to_socket": "steward_edge_append_to_socket_seconds",
    "append_to_ack": "steward_edge_append_to_ack_seconds",
    "failover_gap": "steward_agent_failover_gap_seconds",
    "handoff_gap": "steward_agent_handoff_gap_seconds",
}
"""The latencies that say how it is to be a user: name → histogram."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording rule."""

    record: str
    expression: str
    label: str
    value: str


def recordings() -> list[Recording]:
    """All recording rules."""
    rules = []
    for slo in SLOS:
        if slo.histogram and slo.bound not in {*FAST, *SLOW}:
            raise LookupError(f"{slo.name}: {slo.bound} is no bucket")
        rules += [
            Recording(f"{RATIO}{window}", slo.ratio(window), "slo", slo.name) for window in WINDOWS
        ]
        rules.append(Recording(BUDGET, f"vector({slo.budget:.10g})", "slo", slo.name))
        for window in ("1h", "1d"):
            count = slo.events(window, "increase")
            rules.append(Recording(f"{EVENTS}{window}", count, "slo", slo.name))
    for sli, histogram in SLIS.items():
        rules.append(Recording(SLI_P50, quantile(0.5, histogram), "sli", sli))
        rules.append(Recording(SLI_P99, quantile(0.99, histogram), "sli", sli))
    return rules


def burns(slo: Slo, windows: tuple[tuple[float, str, str, str], ...]) -> str:
    """Whether the budget burns by one of these factors over both of its windows."""
    label = f'{{slo="{slo.name}"}}'
    parts = []
    for factor, long, short, counted in windows:
        bound = f"{factor * slo.budget:.10g}"
        parts.append(
            f"({RATIO}{long}{label} > {bound} and {RATIO}{short}{label} > {bound} "
            f"and {EVENTS}{counted}{label} >= {slo.at_least})"
        )
    return " or ".join(parts)
