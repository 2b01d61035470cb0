"""The values that labels of metrics may have: closed sets, so every series is there at once.

A counter that begins to exist with its first increment hides that increment from `rate`, and
a panel over what never happened yet shows nothing where it should show 0. Both need the values to
be known before; and a label whose values are known can't carry a user, a tenant, a session
or a run. Values come from the tables of the model wherever there is one.
"""

from steward.errors import ERRORS, Reason
from steward.model.verbs import EventType, Outcome
from steward.model.violations import KINDS, Severity, ViolationKind

REASONS = tuple(reason.value for reason in Reason)
EVENT_TYPES = tuple(type.value for type in EventType)
RUN_OUTCOMES = tuple(outcome.value for outcome in Outcome)
REFUSALS = tuple(kind.value for kind, row in KINDS.items() if row.severity is Severity.REFUSAL)
BREACHES = tuple(kind.value for kind, row in KINDS.items() if row.severity is Severity.BREACH)

CENSUS_KINDS = (
    ViolationKind.DUPLICATE_MANAGER.value,
    ViolationKind.STALE_MANAGER.value,
    ViolationKind.ORPHAN_MANAGER.value,
    ViolationKind.UNSEALED_MANAGER.value,
    ViolationKind.UNREACHABLE_USER.value,
    ViolationKind.MISATTACHED_EDGE.value,
)
EVIDENCE = ("A", "B", "C", "D", "E")
NODE_STATES = ("up", "away", "draining")
RESOLVE_RESULTS = ("cached", "placed", "refused")
APPEND_OUTCOMES = ("committed", "repeated", "fenced", "conflict")
SEAL_OUTCOMES = ("sealed", "fenced")
SOCKET_KINDS = ("websocket", "sse")
RESUMES = ("new", "resumed", "reset")
COLLECTIONS = ("0", "1", "2")
"""Generations of Python's garbage collector."""

HANDSHAKE_RESULTS = ("accepted", *REASONS)

OTHER_CODE = "other"
CLOSE_CODES = (
    # RFC 6455 and what is registered; 1006 is a socket that went without a word.
    *(str(code) for code in (*range(1000, 1004), *range(1005, 1015))),
    *sorted({str(row.close_code) for row in ERRORS.values() if (row.close_code or 0) >= 3000}),
    OTHER_CODE,
)

CREDENTIALS = ("token", "ticket_issue", "ticket", "login")
CHECK_RESULTS = (
    "ok",
    Reason.TOKEN_INVALID.value,
    Reason.TOKEN_EXPIRED.value,
    Reason.TOKEN_REVOKED.value,
    Reason.PERMISSION_DENIED.value,
    Reason.PROTOCOL_VIOLATION.value,
    Reason.STORE_UNAVAILABLE.value,
)
