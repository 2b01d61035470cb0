"""The part about the running cluster: a census taken now, what is on record, ledger against log.

Every line comes from calls to the registry that are made for it. What the registry can't answer
makes its lines `not checked`; that a census could not ask everybody makes them so too, since who
was not asked may be the one. A finding is broken either way.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from steward.cli.report.lines import Line, Part, Verdict, some
from steward.errors import StewardError
from steward.model.violations import KINDS, Severity, ViolationKind

if TYPE_CHECKING:
    from steward.cli.operator_calls import Operator
    from steward.v1 import registry_service_pb2 as pb

_K = ViolationKind

CENSUS = {
    _K.DUPLICATE_MANAGER: ("no-duplicate", "no user has two live managers"),
    _K.STALE_MANAGER: ("no-stale", "no manager lives on under an epoch that is over"),
    _K.ORPHAN_MANAGER: ("no-orphan", "every live manager is one that the registry placed"),
    _K.UNSEALED_MANAGER: ("no-unsealed", "every live manager's epoch is sealed in the log"),
    _K.UNREACHABLE_USER: ("no-unreachable", "every placed user has a manager, or can have one"),
    _K.MISATTACHED_EDGE: ("no-misattached", "every edge is attached to the registry's manager"),
}
"""Kinds that a census finds → the line that says there is none."""

LEDGER = {
    _K.FENCE_ABOVE_REGISTRY: (
        "log-in-ledger",
        "every user's epoch in the log was granted by the ledger",
    ),
    _K.UNSEALED_MANAGER: ("ledger-in-log", "every manager of the ledger is known to the log"),
    _K.EPOCH_WENT_DOWN: ("epochs-grow", "each user's epochs in the ledger only grow"),
}

PAGE = 1_000
MOST_PAGES = 200
MOST_ROUNDS_LATE = 6
"""Intervals after which a census that runs by itself is late."""


async def running_lines(operator: "Operator", registry: str) -> list[Line]:
    """The lines about the cluster of this registry."""
    return [
        *await _census(operator, registry),
        *await _records(operator, registry),
        *await _ledger(operator, registry),
    ]


async def _census(operator: "Operator", registry: str) -> list[Line]:
    how = "a census taken for this report: nodes, edges and the log were asked what they hold"
    try:
        before = await operator.take_census(registry, last=True)
        census = await operator.take_census(registry)
    except StewardError as error:
        heads = [_ASKED, *CENSUS.values(), _BY_ITSELF]
        return [_unchecked(head, how, error) for head in heads]
    asked = (
        f"{census.nodes} nodes with {census.managers} managers, {census.placements} placements",
        f"{census.edges} edges with {census.attachments} attached users",
        f"{census.fences} fences of the log read in the last round, which took {census.took_ms} ms",
    )
    complete = Verdict.KEPT if census.complete else Verdict.NOT_CHECKED
    lines = [Line(*_head(_ASKED), complete, how, (*asked, *some(census.missing)))]
    found = Counter(finding.kind for finding in census.findings)
    for kind, head in CENSUS.items():
        if found[kind.value]:
            told = [told_of(each) for each in census.findings if each.kind == kind.value]
            lines.append(Line(*_head(head), Verdict.BROKEN, how, some(told)))
        else:
            of_edges = kind is _K.MISATTACHED_EDGE
            of = f"{census.attachments} attachments" if of_edges else f"{census.managers} managers"
            counted = f"none of {of}"
            missing = () if census.complete else ("not everybody could be asked",)
            lines.append(Line(*_head(head), complete, how, (counted, *missing)))
    lines.append(_runs_by_itself(before))
    return lines


_ASKED = ("census", "every node, every edge and the log were asked")
_BY_ITSELF = ("census-runs", "the census runs by itself, and asks everybody")
_BREACHES = ("no-breach", "no breach was ever recorded")
_REFUSALS = ("refusals", "every refusal is on record with its evidence")


def _runs_by_itself(last: "pb.TakeCensusResponse") -> Line:
    how = "what the registry says of the last census that nobody asked for"
    if not last.interval_ms:
        told = "registry.census_ms is 0: nobody looks until somebody asks"
        return Line(*_head(_BY_ITSELF), Verdict.BROKEN, how, (told,))
    every = f"every {last.interval_ms} ms"
    if not last.HasField("complete_age_ms"):
        told = f"{every}; none is complete since the registry began"
        verdict = Verdict.NOT_CHECKED if not last.at_ms else Verdict.BROKEN
        return Line(*_head(_BY_ITSELF), verdict, how, (told, *some(last.missing)))
    told = f"{every}; the last complete one was {last.complete_age_ms} ms ago"
    late = last.complete_age_ms > MOST_ROUNDS_LATE * last.interval_ms
    verdict = Verdict.BROKEN if late else Verdict.KEPT
    return Line(*_head(_BY_ITSELF), verdict, how, (told, *(some(last.missing) if late else ())))


async def _records(operator: "Operator", registry: str) -> list[Line]:
    from steward.v1 import registry_service_pb2 as pb

    how = "the violations that the registry has on record"
    rows: list[pb.Violation] = []
    try:
        page = await operator.list_violations(registry, pb.ListViolationsRequest(limit=PAGE))
        totals = page
        for _ in range(MOST_PAGES):
            rows += page.violations
            if len(page.violations) < PAGE:
                break
            request = pb.ListViolationsRequest(after=rows[-1].number, limit=PAGE)
            page = await operator.list_violations(registry, request)
    except StewardError as error:
        return [_unchecked(head, how, error) for head in (_BREACHES, _REFUSALS)]
    breaches = [row for row in rows if row.severity == pb.SEVERITY_BREACH]
    told = [f"number {row.number}: {_told_of_row(row)}" for row in breaches]
    verdict = Verdict.BROKEN if totals.breaches else Verdict.KEPT
    counted = f"{totals.breaches} breaches were ever recorded"
    first = Line(*_head(_BREACHES), verdict, how, (counted, *some(told)))
    refusals = [row for row in rows if row.severity == pb.SEVERITY_REFUSAL]
    return [first, _refusals(refusals, totals.refusals, how)]


def _refusals(rows: "list[pb.Violation]", total: int, how: str) -> Line:
    wrong = [f"number {row.number}: {what}" for row in rows for what in _wrong_with(row)]
    by_kind = Counter(row.kind for row in rows)
    counted = ", ".join(f"{count} {kind}" for kind, count in by_kind.most_common())
    verdict = Verdict.BROKEN if wrong else Verdict.KEPT
    told = f"{total} refusals were ever recorded" + (f"; kept: {counted}" if counted else "")
    return Line(*_head(_REFUSALS), verdict, how, (told, *some(wrong)))


def _wrong_with(row: "pb.Violation") -> Iterable[str]:
    try:
        kind = ViolationKind(row.kind)
    except ValueError:
        yield f"{row.kind!r} is no kind that this version knows"
        return
    if KINDS[kind].severity is not Severity.REFUSAL:
        yield f"{row.kind} is a breach, and is kept as a refusal"
    for name in ("evidence", "reporter", "at_ms"):
        if not getattr(row, name):
            yield f"{row.kind} without {name}"


async def _ledger(operator: "Operator", registry: str) -> list[Line]:
    how = "all rows of the ledger against all fences of the log, read for this report"
    try:
        checked = await operator.check_ledger(registry)
    except StewardError as error:
        return [_unchecked(head, how, error) for head in LEDGER.values()]
    counted = f"{checked.rows} rows of the ledger, fences of {checked.fences} users"
    old = f"{checked.not_kept} users have an epoch older than the oldest row that is kept"
    lines = []
    by_kind = Counter(each.kind for each in checked.disagreements)
    listed = sum(by_kind.values())
    for kind, head in LEDGER.items():
        told = [told_of(each) for each in checked.disagreements if each.kind == kind.value]
        if told and checked.found > listed:
            told.append(f"{checked.found - listed} more of all kinds are not listed")
        verdict = Verdict.BROKEN if told else Verdict.KEPT
        aside = (old,) if checked.not_kept and kind is _K.FENCE_ABOVE_REGISTRY else ()
        lines.append(Line(*_head(head), verdict, how, (counted, *aside, *some(told))))
    return lines


def told_of(finding: "pb.CensusFinding") -> str:
    """A finding in one line."""
    return f"{finding.user.tenant_id}/{finding.user.user_id}: {finding.evidence}"


def _told_of_row(row: "pb.Violation") -> str:
    who = f" of {row.user.tenant_id}/{row.user.user_id}" if row.HasField("user") else ""
    return f"{row.kind}{who}: {row.evidence}"


def _unchecked(head: tuple[str, str], how: str, error: StewardError) -> Line:
    return Line(*_head(head), Verdict.NOT_CHECKED, how, (str(error),))


def _head(line: tuple[str, str]) -> tuple[str, Part, str]:
    return line[0], Part.RUNNING, line[1]
