"""`steward violations`: what the guards refused, and what must never happen.

Prints the newest ones, oldest first, one per line (JSON lines with `--json`), then the
totals on stderr. `--follow` goes on with each one as it is recorded, over a restart of
the registry too. Exit code 0, or 1 when there is a breach: so that a check can use it.
"""

import argparse
import asyncio
import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from steward.cli.operating import operate
from steward.cli.target import add_target
from steward.errors import StewardError

if TYPE_CHECKING:
    from steward.cli.operator_calls import Operator
    from steward.v1.registry_service_pb2 import Violation

AGAIN_S = 0.5


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "violations",
        help="show refusals and breaches",
        description="Show what the guards refused, and what must never happen.",
    )
    add_target(parser)
    parser.add_argument("--follow", action="store_true", help="go on as they are recorded")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="the newest N (100)")
    parser.add_argument("--breaches", action="store_true", help="breaches only")


def run(args: argparse.Namespace) -> int:
    """Print them; 1 when there is a breach, ever."""
    if not 1 <= args.limit <= 1000:
        print("steward: --limit is 1 to 1000", file=sys.stderr)
        return 2
    return operate(args, lambda operator, registry: _show(args, operator, registry))


async def _show(args: argparse.Namespace, operator: "Operator", registry: str) -> int:
    from steward.v1 import registry_service_pb2 as pb

    severity = pb.SEVERITY_BREACH if args.breaches else pb.SEVERITY_UNSPECIFIED
    page = await operator.list_violations(
        registry,
        pb.ListViolationsRequest(limit=args.limit, severity=severity, newest=True),
    )
    for violation in page.violations:
        _print(violation, args.json)
    print(f"{page.refusals} refusals, {page.breaches} breaches", file=sys.stderr)
    if args.follow:
        last = page.violations[-1].number if page.violations else 0
        await _follow(args, operator, registry, last)
    return 1 if page.breaches else 0


async def _follow(args: argparse.Namespace, operator: "Operator", registry: str, last: int) -> None:
    from steward.v1 import registry_service_pb2 as pb

    while True:
        try:
            async for violation in operator.watch_violations(registry, last):
                last = violation.number
                if not args.breaches or violation.severity == pb.SEVERITY_BREACH:
                    _print(violation, args.json)
        except StewardError as error:
            if not error.row.retry:
                raise
        await asyncio.sleep(AGAIN_S)


def as_json(violation: "Violation") -> dict[str, Any]:
    """One violation as a JSON object; fields that don't apply are absent."""
    at = datetime.fromtimestamp(violation.at_ms / 1000, UTC)
    fields: dict[str, Any] = {
        "number": violation.number,
        "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "severity": _severity(violation),
        "kind": violation.kind,
        "tenant_id": violation.user.tenant_id,
        "user_id": violation.user.user_id,
        "epoch": violation.epoch,
        "node_id": violation.node_id,
        "node_rev": violation.node_rev,
        "reporter": violation.reporter,
        "evidence": violation.evidence,
        "traceparent": violation.traceparent,
        "count": max(violation.count, 1),
    }
    return {name: value for name, value in fields.items() if value not in ("", 0)}


def _severity(violation: "Violation") -> str:
    from steward.v1 import registry_service_pb2 as pb

    return "breach" if violation.severity == pb.SEVERITY_BREACH else "refusal"


def _print(violation: "Violation", as_line: bool) -> None:
    fields = as_json(violation)
    if as_line:
        print(json.dumps(fields), flush=True)
        return
    who = f" {fields['tenant_id']}/{fields['user_id']}" if "user_id" in fields else ""
    epoch = f" epoch {fields['epoch']}" if "epoch" in fields else ""
    node = f" on {fields['node_id']}/{fields.get('node_rev', 0)}" if "node_id" in fields else ""
    times = f" x{fields['count']}" if fields["count"] > 1 else ""
    mark = "BREACH " if fields["severity"] == "breach" else ""
    print(
        f"{fields['time']} {mark}{fields['kind']}{times}{who}{epoch}{node}"
        f" by {fields.get('reporter', '?')}: {fields.get('evidence', '')}",
        flush=True,
    )
