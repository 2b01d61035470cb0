"""A compliance report in the terminal: one line each, and its evidence where something is wrong."""

from itertools import groupby

from steward.cli.report.lines import Line, Report, Verdict, stamp

MARKS = {Verdict.KEPT: "kept", Verdict.BROKEN: "BROKEN", Verdict.NOT_CHECKED: "not checked"}


def print_table(report: Report) -> None:
    """Print it to stdout."""
    print(f"cluster {report.cluster} at {report.registry}, {stamp(report.at_ms)}")
    for part, lines in groupby(report.lines, key=lambda line: line.part):
        print(f"\n{part.value}")
        for line in lines:
            _print_line(line)
    counts = ", ".join(f"{report.count(verdict)} {verdict.value}" for verdict in Verdict)
    print(f"\n{MARKS[report.verdict]}: {counts}")


def _print_line(line: Line) -> None:
    print(f"  {MARKS[line.verdict]:<12} {line.what}")
    evidence = line.evidence if line.verdict is not Verdict.KEPT else line.evidence[:1]
    for text in evidence:
        print(f"  {'':<12}   {text}")
