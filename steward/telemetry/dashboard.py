"""One Grafana dashboard: what matters on top, then every metric of the catalog, by service.

Counters are shown as rates split by their labels, gauges as they are, histograms as
median and p99. Grafana's dashboard JSON (schema version 39), one Prometheus data source
chosen by a variable.
"""

from typing import Any

import orjson

from steward.telemetry.alerts import JOB, quantile, series
from steward.telemetry.inventory import Kind, MetricRow, metric_rows

SCHEMA_VERSION = 39
COLUMNS = 24
PANEL_WIDTH, PANEL_HEIGHT = 8, 7
STAT_WIDTH, STAT_HEIGHT = 4, 4
RATE_WINDOW = "$__rate_interval"


def render_dashboard() -> str:
    """The dashboard as JSON, the same text for the same catalog."""
    layout = _Layout()
    layout.row("Now")
    for title, expression, unit in _headlines():
        layout.add(_stat(title, expression, unit), STAT_WIDTH, STAT_HEIGHT)
    service = ""
    for metric in metric_rows():
        if metric.service != service:
            service = metric.service
            layout.row(service.capitalize())
        layout.add(_panel(metric), PANEL_WIDTH, PANEL_HEIGHT)
    dashboard = {
        "uid": "steward",
        "title": "Steward",
        "description": "Generated from steward/telemetry/catalog.py.",
        "tags": ["steward"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "templating": {"list": [_DATASOURCE_VARIABLE, _INSTANCE_VARIABLE]},
        "panels": layout.panels,
    }
    return orjson.dumps(dashboard, option=orjson.OPT_INDENT_2).decode() + "\n"


def _headlines() -> list[tuple[str, str, str]]:
    """Title, expression and unit of the numbers on top."""
    return [
        ("Breaches", f"sum({series('steward_breaches_total')}) or vector(0)", "short"),
        ("Connections", f"sum({series('steward_edge_connections')})", "short"),
        ("Managers", f"sum({series('steward_agent_managers')})", "short"),
        ("Nodes up", f"sum({series('steward_registry_nodes', state='up')})", "short"),
        (
            "Durable events/s",
            f"sum(rate({series('steward_log_events_total')}[{RATE_WINDOW}]))",
            "short",
        ),
        ("Append p99", quantile(0.99, "steward_agent_append_seconds", window=RATE_WINDOW), "s"),
    ]


def _panel(metric: MetricRow) -> dict[str, Any]:
    split = ", ".join(("instance", *metric.labels))
    legend = " ".join(f"{{{{{label}}}}}" for label in ("instance", *metric.labels))
    selector = f'{metric.name}{{instance=~"$instance"}}'
    if metric.kind is Kind.COUNTER:
        targets = [(f"sum by ({split}) (rate({selector}[{RATE_WINDOW}]))", legend)]
        unit = "short"
    elif metric.kind is Kind.GAUGE:
        targets = [(f"sum by ({split}) ({selector})", legend)]
        unit = "short"
    else:
        bucket = f'{metric.name}_bucket{{instance=~"$instance"}}'
        targets = [
            (f"histogram_quantile({q}, sum by (le) (rate({bucket}[{RATE_WINDOW}])))", name)
            for q, name in ((0.5, "p50"), (0.99, "p99"))
        ]
        unit = "s" if metric.name.endswith("_seconds") else "short"
    return {
        "type": "timeseries",
        "title": metric.name,
        "description": metric.help,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [_target(i, *target) for i, target in enumerate(targets)],
    }


def _stat(title: str, expression: str, unit: str) -> dict[str, Any]:
    # Zero is green; for breaches anything else is not.
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if title == "Breaches":
        steps.append({"color": "red", "value": 1})
    return {
        "type": "stat",
        "title": title,
        "datasource": _DATASOURCE,
        "fieldConfig": {
            "defaults": {"unit": unit, "thresholds": {"mode": "absolute", "steps": steps}},
            "overrides": [],
        },
        "options": {
            "colorMode": "value",
            "graphMode": "area",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
        "targets": [_target(0, expression, "")],
    }


def _target(index: int, expression: str, legend: str) -> dict[str, Any]:
    return {
        "refId": chr(ord("A") + index),
        "datasource": _DATASOURCE,
        "expr": expression,
        "legendFormat": legend,
    }


class _Layout:
    """Puts panels side by side, row under row."""

    def __init__(self) -> None:
        self.panels: list[dict[str, Any]] = []
        self._x = self._y = self._height = 0

    def row(self, title: str) -> None:
        self._y, self._x = self._y + self._height, 0
        self._place({"type": "row", "title": title, "collapsed": False, "panels": []}, COLUMNS, 1)
        self._y, self._x, self._height = self._y + 1, 0, 0

    def add(self, panel: dict[str, Any], width: int, height: int) -> None:
        if self._x + width > COLUMNS:
            self._y, self._x = self._y + self._height, 0
        self._place(panel, width, height)
        self._x, self._height = self._x + width, height

    def _place(self, panel: dict[str, Any], width: int, height: int) -> None:
        place = {"h": height, "w": width, "x": self._x, "y": self._y}
        self.panels.append({"id": len(self.panels) + 1, "gridPos": place, **panel})


_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_DATASOURCE_VARIABLE = {
    "name": "datasource",
    "type": "datasource",
    "query": "prometheus",
    "label": "Data source",
}
_INSTANCE_VARIABLE = {
    "name": "instance",
    "type": "query",
    "label": "Process",
    "datasource": _DATASOURCE,
    "query": f'label_values(up{{job="{JOB}"}}, instance)',
    "refresh": 2,
    "includeAll": True,
    "allValue": ".*",
    "multi": True,
}
