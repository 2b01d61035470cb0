"""What `make bench` prints and writes: every part, every goal, and whatever was not measured."""

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.load import bench, page
from tests.load.bench_peers import CASES
from tests.load.page import BEGIN, END, Section, markdown
from tests.load.plot import PANELS, plot
from tests.load.rows import Row, text_table

LOAD = Path(bench.__file__).parent

ROWS = [
    Row("push, 1 frame a turn: Steward", "/CPU s", [90_000.0, 110_000.0, 100_000.0]),
    Row("push, 1 frame a turn: Node `ws`", "/CPU s", [50_000.0]),
    Row("push, 1 frame a turn: an edge, as a multiple of Node `ws`", "times", [2.0], 1.0),
    Row("push, 1 frame a turn: picows", "/CPU s", (), missing="no packages"),
    Row("memory: Steward", "KiB", [9.0], goal=8.0, lower_is_better=True),
]


def offers_figures(path: Path) -> bool:
    tree = ast.parse(path.read_text())
    return any(isinstance(node, ast.FunctionDef) and node.name == "figures" for node in tree.body)


def test_every_module_that_has_figures_is_a_part_or_is_called_by_one() -> None:
    offering = {path.stem for path in LOAD.glob("*.py") if offers_figures(path)}
    parts = {part.module for part in bench.PARTS}
    assert parts <= offering
    code = "".join((LOAD / f"{module}.py").read_text() for module in parts)
    assert [name for name in offering - parts if f"{name}.figures(" not in code] == []


def test_a_goal_is_judged_by_the_median_in_its_direction() -> None:
    assert [row.reached for row in ROWS] == [None, None, True, None, False]
    assert Row("a", "ms", [1.0, 9.0, 2.0], goal=2.0, lower_is_better=True).reached
    assert not Row("a", "/s", [1.0, 9.0, 2.0], goal=2.1).reached


def test_what_was_not_measured_and_what_was_missed_is_in_the_tables() -> None:
    for text in (text_table(ROWS), markdown(Section("An edge", ROWS, "here"))):
        assert "**not measured**: no packages" in text
        assert "≤ 8.00, **missed**" in text
        assert "100,000 /CPU s" in text and "90,000 to 110,000" in text


def test_a_markdown_row_has_four_cells() -> None:
    lines = [line for line in markdown(Section("An edge", ROWS, "here")).splitlines()]
    rows = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5}
    assert len(rows) == len(ROWS) + 2


def test_the_page_keeps_its_prose_and_the_sections_of_other_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "performance.md"
    target.write_text(f"# Page\n\n### Mine\n\nbefore\n{BEGIN}\nold\n{END}\nbehind\n")
    monkeypatch.setattr(page, "PAGE", target)
    monkeypatch.setattr(page, "PLOT", tmp_path / "images" / "performance.svg")
    titles = ["An edge", "A log"]
    page.write(titles, [Section("A log", [Row("of the log", "ms", [1.0])], "there")])
    assert not page.PLOT.exists()
    page.write(titles, [Section("An edge", ROWS, "here"), Section("Nobody's", ROWS)])
    text = target.read_text()
    assert text.startswith("# Page\n\n### Mine\n\nbefore\n") and text.endswith("\nbehind\n")
    assert "old" not in text and "Nobody" not in text
    assert text.index("### An edge\n\nhere\n") < text.index("### A log\n\nthere\n")
    assert text.count("| of the log |") == 1
    assert page.PLOT.exists()
    page.write(titles, [Section("A log", [Row("again", "ms", [1.0])], "there")])
    again = target.read_text()
    assert again == text.replace("| of the log |", "| again |")


def test_the_plot_has_a_bar_for_each_figure_and_none_for_ratios_or_for_what_is_missing() -> None:
    svg = ElementTree.fromstring(plot(ROWS))
    name = "{http://www.w3.org/2000/svg}"
    assert len(svg.findall(f"{name}rect")) == 3
    texts = [text.text for text in svg.iter(f"{name}text")]
    assert {"Steward", "Node ws", "100,000", "50,000", "9.00"} <= set(texts)
    widths = [float(bar.attrib["width"]) for bar in svg.findall(f"{name}rect")]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)


def test_the_plot_is_readable_on_dark_and_on_light_pages() -> None:
    text = plot(ROWS)
    assert "prefers-color-scheme: dark" in text
    light, _, dark = text.partition("@media")
    for rule in ("text {", ".bar {", ".bar.ours {"):
        assert rule in light and rule in dark


def test_the_panels_are_those_of_the_comparison() -> None:
    assert set(CASES) < set(PANELS)


def test_a_part_that_fails_is_a_failure_of_the_whole_and_stops_no_other(tmp_path: Path) -> None:
    parts = [bench.Part("no_such_module", "Nothing"), bench.Part("rows", "No figures")]
    sections = bench.run(parts, 1, True)
    assert [section.failed for section in sections] == [True, True]
    assert re.match("ModuleNotFoundError", sections[0].rows[0].missing)
    assert re.match("AttributeError", sections[1].rows[0].missing)
