"""How a Grafana dashboard is built: rows of panels from queries, by Grafana's own SDK.

`grafana-foundation-sdk` is made from the schemas of Grafana, so what it builds is valid for them;
it is needed to make the files, not to use them (extra `dev`). A panel's exemplars are the trace
ids of `steward.telemetry.instruments`.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from steward.telemetry.inventory import Kind, MetricRow
from steward.telemetry.promql import JOB, part, quantile, series

with warnings.catch_warnings():
    # Of the classic schema, in favour of one that only the newest Grafana reads.
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.builders.common import ReduceDataOptions, VizLegendOptions
    from grafana_foundation_sdk.builders.common import VizTooltipOptions as Tooltip
    from grafana_foundation_sdk.builders.dashboard import (
        Dashboard,
        DashboardLink,
        DatasourceVariable,
        QueryVariable,
        Row,
        ThresholdsConfig,
    )
    from grafana_foundation_sdk.builders.prometheus import Dataquery
    from grafana_foundation_sdk.builders.stat import Panel as StatPanel
    from grafana_foundation_sdk.builders.timeseries import Panel as TimePanel
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.common import (
        BigValueColorMode,
        BigValueGraphMode,
        DataSourceRef,
        LegendDisplayMode,
        LegendPlacement,
        SortOrder,
        TooltipDisplayMode,
        VisibilityMode,
    )
    from grafana_foundation_sdk.models.dashboard import Dashboard as DashboardModel
    from grafana_foundation_sdk.models.dashboard import (
        DashboardCursorSync,
        DashboardLinkType,
        Threshold,
        ThresholdsMode,
        VariableRefresh,
    )

WINDOW = "$__rate_interval"
PROCESS = "$instance"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")


@dataclass(frozen=True, slots=True)
class Query:
    """An expression and what its series are called."""

    expression: str
    legend: str = ""
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """A number (`stat`) or a graph. `worst`: the value from which on a number is red."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    help: str = ""
    stat: bool = False
    worst: float | None = None
    most: float | None = None


@dataclass(frozen=True, slots=True)
class Board:
    """A dashboard: title → panels, row by row."""

    uid: str
    title: str
    help: str
    rows: dict[str, list[Panel]] = field(default_factory=dict)


def render(board: Board) -> str:
    """The dashboard as JSON; the same text for the same board."""
    built = (
        Dashboard(board.title)
        .uid(board.uid)
        .description(board.help)
        .tags(["steward"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .editable()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(_links())
        .with_variable(
            DatasourceVariable("datasource").label("Data source").type("prometheus").multi(False)
        )
        .with_variable(
            QueryVariable("instance")
            .label("Process")
            .datasource(_SOURCE)
            .query(f'label_values(up{{job="{JOB}"}}, instance)')
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            .all_value(".*")
            .multi(True)
        )
    )
    for title, panels in board.rows.items():
        built = built.with_row(Row(title))
        for panel in panels:
            built = built.with_panel(_stat(panel) if panel.stat else _graph(panel))
    return JSONEncoder(sort_keys=True, indent=2).encode(_numbered(built)) + "\n"


def reread(text: str) -> DashboardModel:
    """A dashboard's JSON as Grafana's own types. Raises for what does not fit them."""
    register_default_plugins()
    return DashboardModel.from_json(json.loads(text))


def _links() -> DashboardLink:
    """To the other dashboards, with the same process and time."""
    return (
        DashboardLink("Steward")
        .type(DashboardLinkType.DASHBOARDS)
        .tags(["steward"])
        .as_dropdown(True)
        .include_vars(True)
        .keep_time(True)
    )


def expressions(board: Board) -> list[str]:
    """All of it that Prometheus is asked."""
    return [
        query.expression
        for panels in board.rows.values()
        for panel in panels
        for query in panel.queries
    ]


def of_metric(metric: MetricRow) -> Panel:
    """The panel of a metric that needs no more thought than its kind.

    Counters are rates split by their labels, gauges as they are, histograms median and p99.
    """
    split = ", ".join(("instance", *metric.labels))
    legend = " ".join(f"{{{{{label}}}}}" for label in ("instance", *metric.labels))
    unit = "s" if metric.name.endswith("_seconds") else "short"
    unit = "bytes" if metric.name.endswith("_bytes") else unit
    if metric.kind is Kind.HISTOGRAM:
        queries = quantiles(metric.name, instance=PROCESS)
    elif metric.kind is Kind.COUNTER:
        counter = series(metric.name, instance=PROCESS)
        queries = [Query(f"sum by ({split}) (rate({counter}[{WINDOW}]))", legend)]
    else:
        queries = [Query(f"sum by ({split}) ({series(metric.name, instance=PROCESS)})", legend)]
    return Panel(metric.name, queries, unit, metric.help)


def quantiles(name: str, **labels: str) -> list[Query]:
    """Median, p99, and the mean of a histogram; exemplars with the p99."""
    total = f"sum(rate({part(name, 'sum', **labels)}[{WINDOW}]))"
    count = f"sum(rate({part(name, 'count', **labels)}[{WINDOW}]))"
    return [
        Query(quantile(0.5, name, window=WINDOW, **labels), "p50"),
        Query(quantile(0.99, name, window=WINDOW, **labels), "p99", exemplars=True),
        Query(f"{total} / {count}", "mean"),
    ]


def _numbered(built: Dashboard) -> object:
    """Panels with ids of their own, as an import keeps them."""
    model = built.build()
    for number, panel in enumerate(model.panels or [], 1):
        panel.id_val = number
    return model


def _graph(panel: Panel) -> TimePanel:
    made = (
        TimePanel()
        .title(panel.title)
        .description(panel.help)
        .datasource(_SOURCE)
        .unit(panel.unit)
        .min(0)
        .span(8)
        .height(7)
        .fill_opacity(8)
        .show_points(VisibilityMode.NEVER)
        .legend(
            VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(Tooltip().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    if panel.most is not None:
        made = made.max(panel.most)
    for target in _targets(panel):
        made = made.with_target(target)
    return made


def _stat(panel: Panel) -> StatPanel:
    steps = [Threshold(value=None, color="green")]
    if panel.worst is not None:
        steps.append(Threshold(value=panel.worst, color="red"))
    made = (
        StatPanel()
        .title(panel.title)
        .description(panel.help)
        .datasource(_SOURCE)
        .unit(panel.unit)
        .span(4)
        .height(4)
        .thresholds(ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        .color_mode(BigValueColorMode.VALUE)
        .graph_mode(BigValueGraphMode.AREA)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    )
    for target in _targets(panel):
        made = made.with_target(target)
    return made


def _targets(panel: Panel) -> list[Dataquery]:
    targets = []
    for number, query in enumerate(panel.queries):
        target = (
            Dataquery()
            .ref_id(chr(ord("A") + number))
            .datasource(_SOURCE)
            .expr(query.expression)
            .legend_format(query.legend)
            .range()
        )
        targets.append(target.exemplar(True) if query.exemplars else target)
    return targets
