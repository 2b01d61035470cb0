"""What watches Steward names only what Steward exports, and is up to date with the catalog."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from steward.telemetry.alerts import quantile, series
from steward.telemetry.catalog import SERVICES
from steward.telemetry.inventory import EVERY_SERVICE, metric_rows
from steward.telemetry.observability import files, outdated

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"\bsteward_[a-z0-9_]+")
GROUPING = re.compile(r"\bby \(([^)]*)\)")
TARGET_LABELS = {"le", "instance", "service", "job", "namespace"}

SERIES = {name for row in metric_rows() for name in row.series}
NAMES = {row.name for row in metric_rows()}


def expressions() -> list[str]:
    rules = yaml.safe_load((ROOT / "deploy/observability/alerts.yml").read_text())
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard = json.loads((ROOT / "deploy/observability/dashboard.json").read_text())
    return found + [t["expr"] for p in dashboard["panels"] for t in p.get("targets", [])]


def test_the_committed_files_are_those_that_the_catalog_makes() -> None:
    assert outdated(ROOT) == []


def test_every_metric_in_an_expression_is_exported() -> None:
    assert len(expressions()) > len(NAMES)
    for expression in expressions():
        assert set(NAME.findall(expression)) <= SERIES, expression


def test_every_label_in_an_expression_is_one_of_its_metric_or_of_its_target() -> None:
    labels = {name: set(row.labels) for row in metric_rows() for name in row.series}
    for expression in expressions():
        allowed = TARGET_LABELS.union(*(labels[name] for name in NAME.findall(expression)))
        for group in GROUPING.findall(expression):
            assert {label.strip() for label in group.split(",")} <= allowed, expression
        for matchers in re.findall(r"\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= allowed, expression


def test_every_metric_named_in_a_text_is_in_the_catalog() -> None:
    for name, content in files().items():
        assert set(NAME.findall(content)) <= SERIES | NAMES, name


def test_the_dashboard_and_the_docs_show_every_metric() -> None:
    made = files()
    for row in metric_rows():
        assert row.name in made["deploy/observability/dashboard.json"]
        assert f"`{row.name}`" in made["docs/metrics.md"]


def test_the_rows_are_exactly_what_the_services_export() -> None:
    exported: dict[str, str] = {}
    for cls in SERVICES.values():
        registry = CollectorRegistry()
        cls(registry)
        for family in registry.collect():
            suffix = "_total" if family.type == "counter" else ""
            exported[family.name + suffix] = family.type
    assert {row.name: row.kind.value for row in metric_rows()} == exported


def test_a_name_carries_its_unit_and_no_person_is_a_label() -> None:
    for row in metric_rows():
        assert row.kind != "histogram" or row.name.endswith(("_seconds", "_bytes", "_appends"))
        assert (row.kind == "counter") == row.name.endswith("_total")
        assert not {"user", "tenant", "session", "run", "connection"} & set(row.labels)
        assert row.service == EVERY_SERVICE or row.name.startswith(f"steward_{row.service}_")
        assert row.help.endswith(".")


def test_only_breaches_page_as_a_violation() -> None:
    rules = yaml.safe_load((ROOT / "deploy/observability/alerts.yml").read_text())
    by_name = {rule["alert"]: rule for group in rules["groups"] for rule in group["rules"]}
    rule = by_name["StewardSsotViolation"]
    recorded = "steward_registry_violations_total"
    assert set(NAME.findall(rule["expr"])) == {"steward_breaches_total", recorded}
    assert rule["expr"].count(recorded) == rule["expr"].count(f'{recorded}{{severity=~"breach"}}')
    assert rule["labels"]["severity"] == "page" and rule["for"] == "0m"
    for name, other in by_name.items():
        assert "steward_refusals_total" not in other["expr"], name
        assert recorded not in other["expr"] or other is rule, name
        assert other["labels"]["severity"] in ("page", "warning")
        assert other["annotations"]["summary"] and other["annotations"]["description"]


def test_an_expression_over_what_does_not_exist_can_not_be_written() -> None:
    with pytest.raises(LookupError):
        series("steward_no_such_total")
    with pytest.raises(LookupError):
        series("steward_registry_nodes", colour="up")
    with pytest.raises(LookupError):
        series("steward_loop_lag_seconds")
    with pytest.raises(LookupError):
        quantile(0.5, "steward_registry_nodes")


def test_panels_do_not_lie_on_each_other_and_have_ids_of_their_own() -> None:
    dashboard = json.loads((ROOT / "deploy/observability/dashboard.json").read_text())
    panels: list[dict[str, Any]] = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells


def test_a_missing_or_changed_file_is_reported(tmp_path: Path) -> None:
    assert set(outdated(tmp_path)) == set(files())
    for name, content in files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert outdated(tmp_path) == []
    (tmp_path / "docs/metrics.md").write_text("edited by hand")
    assert outdated(tmp_path) == ["docs/metrics.md"]


def test_the_alert_rules_pass_their_own_tests() -> None:
    """Always: the scenarios speak of alerts that exist. With promtool at hand: they pass."""
    scenarios = yaml.safe_load((ROOT / "deploy/observability/alerts.test.yml").read_text())
    named = {case["alertname"] for test in scenarios["tests"] for case in test["alert_rule_test"]}
    rules = yaml.safe_load((ROOT / "deploy/observability/alerts.yml").read_text())
    assert named <= {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    promtool = shutil.which("promtool", path=os.environ.get("PATH"))
    if promtool is not None:
        done = subprocess.run(
            [promtool, "test", "rules", "alerts.test.yml"],
            cwd=ROOT / "deploy/observability",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
