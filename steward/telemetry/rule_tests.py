"""Tests of the rules, for `promtool test rules`: each alert fires when it should, and not before.

A scenario is series and what fires when. The annotations that promtool wants to see are made from
the alerts themselves, so a scenario says only what it is about.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from steward.telemetry.alert import Alert
from steward.telemetry.alerts import ALERT_GROUP, RECORDING_GROUP, alerts, runbook_of
from steward.telemetry.slos import SLOS, Slo

_LABEL = re.compile(r"{{ \$labels\.(\w+) }}")
Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Fires:
    """At this time this alert fires for these label sets; for none: it does not fire."""

    at: str
    alert: str
    labels: Sequence[Labels] = ()


@dataclass(frozen=True, slots=True)
class Scenario:
    """Series in promtool's notation, from the start on at every `interval`."""

    name: str
    series: Mapping[str, str]
    fires: Sequence[Fires]
    interval: str = "30s"


def render_rule_tests(
    scenarios: Sequence[Scenario], evaluation: str, rule_files: Sequence[str]
) -> str:
    """A file of tests of these files of rules. Raises KeyError for an alert that does not exist."""
    by_name = {alert.name: alert for alert in alerts()}
    content = {
        "rule_files": list(rule_files),
        "evaluation_interval": evaluation,
        # What alerts read is recorded before; promtool takes groups in any order else, and an
        # interval is longer than a sample lives.
        "group_eval_order": [RECORDING_GROUP, ALERT_GROUP],
        "tests": [
            {
                "name": scenario.name,
                "interval": scenario.interval,
                "input_series": [
                    {"series": name, "values": values} for name, values in scenario.series.items()
                ],
                "alert_rule_test": [_case(by_name[one.alert], one) for one in scenario.fires],
            }
            for scenario in scenarios
        ],
    }
    text: str = yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)
    return text


def _case(alert: Alert, fires: Fires) -> dict[str, object]:
    case: dict[str, object] = {"eval_time": fires.at, "alertname": alert.name}
    expected = [
        {
            "exp_labels": {**labels, "severity": alert.severity},
            "exp_annotations": {
                "summary": _filled(alert.summary, labels),
                "description": _filled(alert.steps[0], labels),
                "runbook": runbook_of(alert),
            },
        }
        for labels in fires.labels
    ]
    if expected:
        case["exp_alerts"] = expected
    return case


def _filled(text: str, labels: Labels) -> str:
    return _LABEL.sub(lambda found: labels.get(found[1], ""), text)


@dataclass(frozen=True, slots=True)
class _Flow:
    """What good and bad ones look like for one objective: series → part of all."""

    slo: Slo

    def series(self, phases: Sequence[tuple[float, int]]) -> dict[str, str]:
        """1000 events a step; phases of so many steps with this part of them bad."""
        slo = self.slo
        if not slo.histogram:
            label, values = (slo.bad or slo.of)[0]
            bad = f'{slo.counter}{{{label}="{values.split("|")[0]}"}}'
            fine = "resumed" if slo.name == "resume" else "accepted"
            good = f'{slo.counter}{{{label}="{fine}"}}'
            return {
                bad: _steps([(1000 * part, steps) for part, steps in phases]),
                good: _steps([(1000 * (1 - part), steps) for part, steps in phases]),
            }
        within = f'{slo.histogram}_bucket{{le="{slo.bound}"}}'
        return {
            within: _steps([(1000 * (1 - part), steps) for part, steps in phases]),
            f"{slo.histogram}_count": _steps([(1000, steps) for _, steps in phases]),
        }


def _steps(phases: Sequence[tuple[float, int]]) -> str:
    """A counter that grows by so much at each of so many steps, phase after phase."""
    texts, value = [], 0.0
    for growth, steps in phases:
        texts.append(f"{value:.10g}+{growth:.10g}x{steps}")
        value += growth * (steps + 1)
    return " ".join(texts)


def budget_scenarios() -> list[Scenario]:
    """All objectives at once, since they share nothing: an outage, a slow leak, and neither.

    A step is two minutes, and the rules are evaluated every ten.
    """

    def series(phases: Callable[[Slo], Sequence[tuple[float, int]]]) -> dict[str, str]:
        made: dict[str, str] = {}
        for slo in SLOS:
            made |= _Flow(slo).series(phases(slo))
        return made

    def fast(at: str, fires: bool) -> list[Fires]:
        return [_burns(slo, "Fast", at, fires) for slo in SLOS]

    def slow(at: str, fires: bool) -> list[Fires]:
        return [_burns(slo, "Slowly", at, fires) for slo in SLOS]

    return [
        Scenario(
            "an outage of an hour pages, and no longer when it is over",
            series(lambda slo: [(0.0, 60), (0.5, 30), (0.0, 60)]),
            [*fast("2h", False), *fast("3h", True), *fast("4h50m", False)],
            "2m",
        ),
        Scenario(
            "what eats twice the budget for days warns, and does not page",
            series(lambda slo: [(2 * slo.budget, 2400)]),
            [*fast("3d6h", False), *slow("3d6h", True)],
            "2m",
        ),
        Scenario(
            "half of the budget is what it is for",
            series(lambda slo: [(slo.budget / 2, 900)]),
            [*fast("1d5h", False), *slow("1d5h", False)],
            "2m",
        ),
    ]


def _burns(slo: Slo, how: str, at: str, fires: bool) -> Fires:
    labels = ({"slo": slo.name},) if fires else ()
    return Fires(at, f"Steward{slo.title}BudgetBurns{how}", labels)
