"""Between `steward.v1` messages and what the store records: violations and the ledger.

Checked like all that comes from outside: see `registry_service.convert`.
"""

import asyncio
from collections.abc import Iterable

from registry_service.convert import (
    epoch_in,
    incarnation_in,
    kind_in,
    traceparent_in,
    user_in,
    violation,
)
from registry_service.store.port import LedgerRow
from registry_service.store.violation_table import ViolationRow
from steward.model.evidence import clean
from steward.model.violations import Severity, Violation
from steward.v1 import placement_pb2, registry_service_pb2
from steward.v1.registry_service_pb2 import (
    SEVERITY_BREACH,
    SEVERITY_REFUSAL,
    SEVERITY_UNSPECIFIED,
)

MOST_REPORTED = 256
MOST_LISTED = 1000
LISTED = 100
LONG_EVIDENCE_CHARS = 512
MOST_REPORTER_CHARS = 160
MOST_NUMBER = (1 << 63) - 1

_SEVERITIES = {SEVERITY_REFUSAL: Severity.REFUSAL, SEVERITY_BREACH: Severity.BREACH}
_WIRE_SEVERITIES = {severity: wire for wire, severity in _SEVERITIES.items()}


def violation_in(proto: registry_service_pb2.Violation) -> Violation:
    """One of a report. Its severity is that of its kind, whatever the report says."""
    return Violation(
        kind_in(proto.kind),
        clean(proto.evidence),
        user_in(proto.user) if proto.HasField("user") else None,
        epoch_in(proto.epoch),
        incarnation_in(proto.node_id, proto.node_rev) if proto.node_id else None,
        traceparent_in(proto.traceparent),
        max(proto.count, 1),
    )


async def violations_in(
    request: registry_service_pb2.ReportViolationsRequest,
) -> list[Violation]:
    """Those of a report. Lets others run between them: long evidence takes time to clean."""
    if len(request.violations) > MOST_REPORTED:
        raise violation(f"at most {MOST_REPORTED} violations in one report")
    violations = []
    for proto in request.violations:
        violations.append(violation_in(proto))
        if len(proto.evidence) > LONG_EVIDENCE_CHARS:
            await asyncio.sleep(0)
    return violations


def reporter_in(caller: str) -> str:
    """`role:id` of the caller's token, fit to be kept."""
    return clean(caller)[:MOST_REPORTER_CHARS]


def limit_in(limit: int) -> int:
    """0 is 100."""
    if limit > MOST_LISTED:
        raise violation(f"limit is 1 to {MOST_LISTED}")
    return limit or LISTED


def number_in(number: int) -> int:
    if number > MOST_NUMBER:
        raise violation("a number is below 2^63")
    return number


def severity_in(wire: "registry_service_pb2.Severity.ValueType") -> Severity | None:
    """None: both."""
    if wire == SEVERITY_UNSPECIFIED:
        return None
    if wire not in _SEVERITIES:
        raise violation(f"{wire} is no severity")
    return _SEVERITIES[wire]


def violations_out(rows: Iterable[ViolationRow]) -> list[registry_service_pb2.Violation]:
    return [
        registry_service_pb2.Violation(
            number=row.number,
            at_ms=row.at_ms,
            severity=_WIRE_SEVERITIES[row.severity],
            kind=row.kind,
            user=_user_out(row.tenant, row.user),
            epoch=row.epoch,
            node_id=row.node_id,
            node_rev=row.node_rev,
            reporter=row.reporter,
            evidence=row.evidence,
            traceparent=row.traceparent,
            count=row.count,
        )
        for row in rows
    ]


def ledger_out(rows: Iterable[LedgerRow]) -> list[registry_service_pb2.LedgerEntry]:
    return [
        registry_service_pb2.LedgerEntry(
            number=row.number,
            revision=row.revision,
            at_ms=row.at_ms,
            kind=row.kind,
            user=_user_out(row.tenant, row.user),
            epoch=row.epoch,
            node_id=row.node_id,
            node_rev=row.node_rev,
            cause=row.cause,
            evidence=row.evidence,
            traceparent=row.traceparent,
        )
        for row in rows
    ]


def _user_out(tenant: str, user: str) -> placement_pb2.UserKey | None:
    return placement_pb2.UserKey(tenant_id=tenant, user_id=user) if user else None
