"""The plot of docs/performance.md: an edge beside other servers, as bars.

A picture that stands by itself: no script, no font, and colours that follow the reader's scheme, so
that it can be read on a dark page and on a light one.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from tests.load.rows import Row, number

OURS = "Steward"
PANELS: Mapping[str, tuple[str, str]] = {
    "push, 1 frame a turn": ("Push", "frames per CPU-second, one for each socket in turn"),
    "push, 8 frames a turn": ("Push in bursts", "frames per CPU-second, eight for each socket"),
    "client messages, answered": ("Client messages", "received and answered per CPU-second"),
    "memory": ("Memory", "KiB per idle connection, less is better"),
}
"""What the rows of a panel begin with, its title, and its unit."""

WIDTH, MARGIN, GAP = 920, 20, 40
LABEL, VALUE = 150, 70
LINE, BAR, HEAD = 24, 14, 62
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.unit, .value { fill: #59636e }
.ours { font-weight: 600 }
.bar { fill: #afb8c1 } .bar.ours { fill: #0969da } .bar.limit { fill: #d4d9de }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .unit, .value { fill: #9198a1 }
  .bar { fill: #57606a } .bar.ours { fill: #4493f8 } .bar.limit { fill: #373e47 }
}
"""


def plot(rows: Sequence[Row]) -> str:
    """An SVG of the panels that there are rows for, two beside each other; empty without any."""
    panels = []
    for begin, (title, unit) in PANELS.items():
        bars = [
            (row.what.removeprefix(f"{begin}: ").replace("`", ""), row.median)
            for row in rows
            if row.what.startswith(f"{begin}: ") and " as a multiple" not in row.what and row.values
        ]
        if bars:
            panels.append((title, unit, bars))
    if not panels:
        return ""
    most = max(len(bars) for _, _, bars in panels)
    tall = HEAD + most * LINE
    height = MARGIN * 2 + (len(panels) + 1) // 2 * (tall + GAP) - GAP
    parts: list[str] = []
    for index, (title, unit, bars) in enumerate(panels):
        left = MARGIN + index % 2 * (WIDTH - GAP) / 2
        top = MARGIN + index // 2 * (tall + GAP)
        parts.extend(_panel(left, top, title, unit, bars))
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>An edge of Steward beside other servers</title>",
            f"<style>{STYLE}</style>",
            *parts,
            "</svg>",
            "",
        )
    )


def _panel(
    left: float, top: float, title: str, unit: str, bars: Sequence[tuple[str, float]]
) -> Iterator[str]:
    """Title, unit, and a line for each bar, whose longest is that of the largest value."""
    yield _text(left, top + 14, title, "title")
    yield _text(left, top + 34, unit, "unit")
    room = (WIDTH - GAP) / 2 - MARGIN - LABEL - VALUE
    largest = max(value for _, value in bars) or 1.0
    for line, (label, value) in enumerate(bars):
        at = top + HEAD + line * LINE
        kind = " ours" if label == OURS else " limit" if label.startswith("C,") else ""
        yield _text(left, at + 11, "C (the limit)" if "limit" in kind else label, f"label{kind}")
        width = max(value / largest * room, 1.5)
        yield (
            f'<rect class="bar{kind}" x="{left + LABEL:.1f}" y="{at}" rx="2" '
            f'width="{width:.1f}" height="{BAR}"/>'
        )
        yield _text(left + LABEL + width + 8, at + 11, number(value), f"value{kind}")


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
