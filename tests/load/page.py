"""Where figures go: a table for a terminal, and those in docs/performance.md with their plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.load.plot import plot
from tests.load.rows import Row, text_table

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "performance.md"
PLOT = DOCS / "images" / "performance.svg"
BEGIN, END = "<!-- figures: written by make bench -->", "<!-- end of figures -->"
HEADING = "\n### "


@dataclass(frozen=True, slots=True)
class Section:
    """The figures of one part, and on what they were measured.

    `cpu_s` is of all its processes that have ended. `failed`: its one row says why it has none.
    """

    title: str
    rows: Sequence[Row]
    where: str = ""
    seconds: float = 0.0
    cpu_s: float = 0.0
    failed: bool = False


def show(sections: Sequence[Section]) -> None:
    """Print everything to stdout."""
    for section in sections:
        print(f"\n{section.title}: {section.where}\n\n{text_table(section.rows)}")


def write(titles: Sequence[str], sections: Sequence[Section]) -> None:
    """Put sections into the page, among those that are there, in the order of `titles`.

    The prose around them stays; what is of no title goes. The plot is drawn anew when there are
    rows for it.
    """
    page = PAGE.read_text()
    before, begin, rest = page.partition(BEGIN)
    figures, end, behind = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} has no place for figures: {BEGIN} and {END}")
    texts = _by_title(figures) | {section.title: markdown(section) for section in sections}
    kept = "\n\n".join(texts[title] for title in titles if title in texts)
    PAGE.write_text(f"{before}{BEGIN}\n\n{kept}\n\n{END}{behind}")
    if drawing := plot([row for section in sections for row in section.rows]):
        PLOT.parent.mkdir(exist_ok=True)
        PLOT.write_text(drawing)


def markdown(section: Section) -> str:
    """One section: its heading, on what it was measured, its table."""
    lines = [f"{HEADING.strip()} {section.title}", "", section.where, ""]
    lines += ["| what | median | least to greatest | goal |", "|---|---:|---|---|"]
    lines += [f"| {' | '.join(row.cells())} |" for row in section.rows]
    return "\n".join(lines)


def _by_title(figures: str) -> dict[str, str]:
    parts = figures.split(HEADING)[1:]
    return {part.partition("\n")[0]: (HEADING + part).strip() for part in parts}
