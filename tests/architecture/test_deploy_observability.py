"""What watches Steward names only what Steward exports, and is up to date with the catalog."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from steward.telemetry.alerts import RUNBOOKS, alerts
from steward.telemetry.boards import FOLDER, boards
from steward.telemetry.catalog import SERVICES
from steward.telemetry.dashboard import expressions as asked_by
from steward.telemetry.dashboard import reread
from steward.telemetry.inventory import EVERY_SERVICE, PROCESS, metric_rows
from steward.telemetry.observability import files, outdated
from steward.telemetry.promql import part, quantile, series
from steward.telemetry.slos import SLOS, recordings
from steward.testing.prometheus import missing, write_config

ROOT = Path(__file__).parents[2]
WATCH = ROOT / "deploy/observability"
NAME = re.compile(r"\bsteward_[a-z0-9_]+")
RECORDED = re.compile(r"\bsteward:[a-z0-9_:]+")
GROUPING = re.compile(r"\b(?:by|on) \(([^)]*)\)")
TARGET_LABELS = {"le", "instance", "service", "job", "namespace"}
RULE_LABELS = {"slo", "sli"}
NOBODY = {"user", "tenant", "session", "run", "connection", "thread", "user_id", "run_id"}

SERIES = {name for row in metric_rows() for name in row.series}
NAMES = {row.name for row in metric_rows()}

with_promtool = pytest.mark.skipif(bool(missing()), reason=missing() or "none")


def rules_of(name: str) -> list[dict[str, Any]]:
    content = yaml.safe_load((WATCH / name).read_text())
    return [rule for group in content["groups"] for rule in group["rules"]]


def dashboards() -> dict[str, dict[str, Any]]:
    found = {path.stem: json.loads(path.read_text()) for path in (ROOT / FOLDER).glob("*.json")}
    assert found.keys() == boards().keys()
    return found


def expressions() -> list[str]:
    found = [rule["expr"] for name in ("alerts.yml", "recordings.yml") for rule in rules_of(name)]
    for dashboard in dashboards().values():
        found += [t["expr"] for p in dashboard["panels"] for t in p.get("targets", [])]
    return found


def promtool(*words: str) -> None:
    program = shutil.which("promtool")
    assert program is not None
    done = subprocess.run([program, *words], cwd=WATCH, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_committed_files_are_those_that_the_catalog_makes() -> None:
    assert outdated(ROOT) == []


def test_every_metric_in_an_expression_is_exported_or_recorded() -> None:
    recorded = {rule["record"] for rule in rules_of("recordings.yml")}
    assert len(expressions()) > len(NAMES)
    for expression in expressions():
        assert set(NAME.findall(expression)) <= SERIES, expression
        assert set(RECORDED.findall(expression)) <= recorded, expression


def test_every_label_in_an_expression_is_one_of_its_metric_or_of_its_target() -> None:
    labels = {name: set(row.labels) for row in metric_rows() for name in row.series}
    for expression in expressions():
        allowed = TARGET_LABELS.union(*(labels[name] for name in NAME.findall(expression)))
        if RECORDED.search(expression):
            allowed |= RULE_LABELS
        for group in GROUPING.findall(expression):
            assert {label.strip() for label in group.split(",")} <= allowed, expression
        for matchers in re.findall(r"\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= allowed, expression


def test_every_label_value_in_an_expression_is_one_that_its_metric_has() -> None:
    """A pattern that matches nothing would be a panel that is empty for ever."""
    rows = {row.name: row for row in metric_rows()}
    for expression in expressions():
        for name, matchers in re.findall(r"(steward_[a-z0-9_]+)\{([^}]*)\}", expression):
            row = rows.get(name)
            for label, pattern in re.findall(r'(\w+)=~"([^"]*)"', matchers):
                if row is None or label not in row.labels:
                    continue
                values = {one[row.labels.index(label)] for one in row.values}
                # Each alternative, so that a typing error in one of them is seen too.
                for alternative in pattern.split("|"):
                    assert any(re.fullmatch(alternative, value) for value in values), expression


def test_every_metric_named_in_a_text_is_in_the_catalog() -> None:
    for name, content in files().items():
        if not name.endswith(".test.yml"):
            assert set(NAME.findall(content)) <= SERIES | NAMES, name


def test_the_dashboards_and_the_docs_show_every_metric() -> None:
    made = files()
    shown = " ".join(made[f"{FOLDER}/{name}.json"] for name in boards())
    for row in metric_rows():
        assert row.name in shown
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
        assert not NOBODY & set(row.labels)
        ours = row.name.startswith(("steward_", PROCESS))
        assert ours and (row.service == EVERY_SERVICE or f"_{row.service}_" in row.name)
        assert row.help.endswith(".")


def test_every_series_with_labels_exists_before_anything_has_happened() -> None:
    for row in metric_rows():
        assert bool(row.labels) == bool(row.values), row.name
        assert len(row.values) <= 60, f"{row.name}: labels are few, or they are no labels"


def test_only_breaches_page_as_a_violation() -> None:
    by_name = {rule["alert"]: rule for rule in rules_of("alerts.yml")}
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


def test_every_alert_has_a_section_in_the_runbooks_and_its_own_name() -> None:
    text = (ROOT / RUNBOOKS).read_text()
    sections = set(re.findall(r"^## (\w+)$", text, re.MULTILINE))
    rules = rules_of("alerts.yml")
    assert sections == {rule["alert"] for rule in rules} and len(sections) == len(rules)
    for alert in alerts():
        assert len(alert.steps) >= 2 and alert.effect, alert.name
    for rule in rules:
        assert rule["annotations"]["runbook"] == f"{RUNBOOKS}#{rule['alert'].lower()}"


def test_every_objective_burns_over_a_long_and_a_short_window() -> None:
    by_name = {rule["alert"]: rule["expr"] for rule in rules_of("alerts.yml")}
    for slo in SLOS:
        fast = by_name[f"Steward{slo.title}BudgetBurnsFast"]
        slow = by_name[f"Steward{slo.title}BudgetBurnsSlowly"]
        assert re.findall(r"ratio_rate(\w+)\{", fast) == ["1h", "5m", "6h", "30m"]
        assert re.findall(r"ratio_rate(\w+)\{", slow) == ["1d", "2h", "3d", "6h"]
        assert f"> {14.4 * slo.budget:.10g} " in fast and f"> {slo.budget:.10g} " in slow
    assert len({(one.record, one.value) for one in recordings()}) == len(recordings())


def test_an_expression_over_what_does_not_exist_can_not_be_written() -> None:
    with pytest.raises(LookupError):
        series("steward_no_such_total")
    with pytest.raises(LookupError):
        series("steward_registry_nodes", colour="up")
    with pytest.raises(LookupError):
        series("steward_loop_lag_seconds")
    with pytest.raises(LookupError):
        quantile(0.5, "steward_registry_nodes")
    with pytest.raises(LookupError):
        part("steward_loop_lag_seconds", "bucket", colour="up")


def test_the_dashboards_are_read_back_by_grafanas_own_models_without_a_loss() -> None:
    for name, dashboard in dashboards().items():
        read = reread(json.dumps(dashboard))
        assert read.schema_version >= 42 and read.uid == f"steward-{name}"
        assert len(read.panels or []) == len(dashboard["panels"])
        asked = [t["expr"] for p in dashboard["panels"] for t in p.get("targets", [])]
        assert asked == asked_by(boards()[name])


def test_panels_do_not_lie_on_each_other_and_have_ids_of_their_own() -> None:
    for dashboard in dashboards().values():
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
            assert not cells & taken, panel["title"]
            taken |= cells


def test_a_missing_or_changed_file_is_reported(tmp_path: Path) -> None:
    assert set(outdated(tmp_path)) == set(files())
    for name, content in files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert outdated(tmp_path) == []
    (tmp_path / "docs/metrics.md").write_text("edited by hand")
    assert outdated(tmp_path) == ["docs/metrics.md"]


def test_every_alert_has_a_scenario_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fires: dict[str, set[bool]] = {}
    for name in ("alerts.test.yml", "budgets.test.yml"):
        for test in yaml.safe_load((WATCH / name).read_text())["tests"]:
            for case in test["alert_rule_test"]:
                fires.setdefault(case["alertname"], set()).add("exp_alerts" in case)
    assert fires == {alert.name: {True, False} for alert in alerts()}


@with_promtool
@pytest.mark.parametrize("name", ["alerts.test.yml", "budgets.test.yml"])
def test_the_rules_pass_their_own_tests(name: str) -> None:
    assert (WATCH / name).exists()
    promtool("test", "rules", name)


@with_promtool
def test_promtool_finds_nothing_wrong_with_rules_and_configuration(tmp_path: Path) -> None:
    """Debian's promtool knows no Kubernetes: there that part is taken for a list of targets."""
    promtool("check", "rules", "alerts.yml", "recordings.yml")
    config = yaml.safe_load((WATCH / "prometheus.yml").read_text())
    config["rule_files"] = [str(WATCH / name) for name in config["rule_files"]]
    [job] = config["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    job["static_configs"] = [{"targets": ["127.0.0.1:9000"]}]
    (tmp_path / "cluster.yml").write_text(yaml.safe_dump(config))
    promtool("check", "config", str(tmp_path / "cluster.yml"))
    (tmp_path / "targets.json").write_text("[]")
    promtool("check", "config", str(write_config(tmp_path, WATCH, 5)))
