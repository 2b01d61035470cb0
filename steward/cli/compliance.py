"""`steward compliance`: the report on the single source of truth, made by looking, now.

Three parts: the code, the running cluster, and with `--load` the cluster under load. Each line says
what was looked at, what came out (kept, broken, not checked), how it was obtained, when, and on
what evidence. The lines are in docs/compliance.md, with what turns each red. Printed as a table, as
JSON (`--json`), or as one page of HTML to keep (`--html FILE`).

Exit code 0, also when something could not be checked; 1 when anything is broken, or the cluster did
not answer; 2 for wrong use.
"""

import argparse
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from steward.cli.operating import finish
from steward.cli.report.lines import Line, Part, Report, Verdict
from steward.cli.target import Target, add_target

if TYPE_CHECKING:
    from steward.cli.operator_calls import Operator


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "compliance",
        help="report whether one manager per user is kept, in code, cluster and under load",
        description="Look at the code, the running cluster and the log, and report what is kept.",
    )
    add_target(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    parser.add_argument("--load", action="store_true", help="put it under load and play cheats too")
    parser.add_argument("--no-code", action="store_true", help="leave out the part about the code")


def run(args: argparse.Namespace) -> int:
    """Look, and report; 1 when anything is broken."""
    from steward.cli.report.page import render_page
    from steward.cli.report.table import print_table

    found: list[Line] = []
    where: list[Target] = []

    async def look(target: Target) -> int:
        where.append(target)
        found.extend(await _look(args, target))
        return 0

    code = finish(args, look)
    if code:
        return code
    (target,) = where
    report = Report(
        target.cluster,
        target.registry,
        version("steward"),
        tuple(sorted(found, key=lambda line: list(Part).index(line.part))),
        time.time_ns() // 1_000_000,
    )
    if args.html is not None:
        try:
            args.html.write_text(render_page(report), encoding="utf-8")
        except OSError as error:
            print(f"steward: --html {args.html}: {error}", file=sys.stderr)
            return 2
    if args.json:
        import json

        print(json.dumps(report.as_json(), indent=2))
    else:
        print_table(report)
    return 1 if report.verdict is Verdict.BROKEN else 0


async def _look(args: argparse.Namespace, target: Target) -> list[Line]:
    import asyncio

    from steward.cli.operator_calls import Operator
    from steward.cli.report.load_part import cheats_line, lines_not_asked_for, streams_line
    from steward.cli.report.running import running_lines
    from steward.cli.report.static import static_lines

    lines: list[Line] = []
    async with Operator(target.key, target.cluster) as operator:
        await _answers(operator, target.registry)
        if not args.no_code:
            lines += await asyncio.to_thread(static_lines)
        if args.load:
            lines.append(await asyncio.to_thread(streams_line, target))
            lines.append(await cheats_line(target))
        else:
            lines += lines_not_asked_for()
        # Last, so that what the load and the cheats left behind is seen too.
        lines += await running_lines(operator, target.registry)
    return lines


async def _answers(operator: "Operator", registry: str) -> None:
    """A cluster that is not there makes no report. Raises StewardError."""
    await operator.describe_cluster(registry)
