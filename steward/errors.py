"""THE error table: every reason that Steward gives, with its gRPC code, close code and HTTP status.

A reason is what a program acts on; the message is for people and says what to do. The
range of a close code tells a client how to go on: 4000 to 4499 connect again and
resume, 4500 to 4999 and 1009 stop, anything else connect again with backoff. The
table of `docs/wire-protocol.md` is checked against this one by a test.

gRPC status objects are made from this table in `steward.rpc.status`; this module
imports nothing of gRPC, since the client SDK uses it.
"""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why something was refused or closed."""

    TOKEN_EXPIRED = "TOKEN_EXPIRED"
    EDGE_DRAINING = "EDGE_DRAINING"
    NO_CAPACITY = "NO_CAPACITY"
    SLOW_CONSUMER = "SLOW_CONSUMER"
    RATE_LIMITED = "RATE_LIMITED"
    MANAGER_UNAVAILABLE = "MANAGER_UNAVAILABLE"
    HEARTBEAT_TIMEOUT = "HEARTBEAT_TIMEOUT"
    CONNECTION_AGED = "CONNECTION_AGED"
    TOKEN_INVALID = "TOKEN_INVALID"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    PROTOCOL_VIOLATION = "PROTOCOL_VIOLATION"
    USER_EVICTED = "USER_EVICTED"
    TOKEN_REVOKED = "TOKEN_REVOKED"
    CONNECTION_REPLACED = "CONNECTION_REPLACED"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    INTERNAL = "INTERNAL"
    # Only in `error` frames and HTTP answers.
    NOT_FOUND = "NOT_FOUND"
    OVERLAP_REJECTED = "OVERLAP_REJECTED"
    QUEUE_FULL = "QUEUE_FULL"
    # Only inside: the edge handles them, a client sees at most a pause.
    MANAGER_MOVED = "MANAGER_MOVED"
    EPOCH_STALE = "EPOCH_STALE"
    LEASE_EXPIRED = "LEASE_EXPIRED"
    NODE_DRAINING = "NODE_DRAINING"
    NODE_ID_IN_USE = "NODE_ID_IN_USE"
    PLACEMENT_UNKNOWN = "PLACEMENT_UNKNOWN"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    POSITION_COMPACTED = "POSITION_COMPACTED"


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One row of the table. `close_code` and `http_status` are None where no client sees it."""

    reason: Reason
    grpc_code: str
    close_code: int | None
    http_status: int | None
    retry: bool
    client_does: str

    @property
    def is_fault(self) -> bool:
        """Whether it is the cluster's doing, not that of who asked."""
        return self.http_status is None or self.http_status >= 500


def _row(
    reason: Reason,
    grpc_code: str,
    close_code: int | None,
    http_status: int | None,
    retry: bool,
    client_does: str,
) -> tuple[Reason, ErrorRow]:
    return reason, ErrorRow(reason, grpc_code, close_code, http_status, retry, client_does)


_R = Reason
ERRORS: dict[Reason, ErrorRow] = dict(
    [
        _row(_R.TOKEN_EXPIRED, "UNAUTHENTICATED", 4001, 401, True, "new token, reconnect"),
        _row(_R.EDGE_DRAINING, "UNAVAILABLE", 4002, 503, True, "reconnect after the delay given"),
        _row(_R.NO_CAPACITY, "RESOURCE_EXHAUSTED", 4003, 503, True, "reconnect with backoff"),
        _row(_R.SLOW_CONSUMER, "RESOURCE_EXHAUSTED", 4004, None, True, "reconnect and resume"),
        _row(_R.RATE_LIMITED, "RESOURCE_EXHAUSTED", 4005, 429, True, "wait as told"),
        _row(_R.MANAGER_UNAVAILABLE, "UNAVAILABLE", 4006, 503, True, "reconnect with backoff"),
        _row(_R.HEARTBEAT_TIMEOUT, "UNAVAILABLE", 4007, None, True, "reconnect and resume"),
        _row(_R.CONNECTION_AGED, "UNAVAILABLE", 4008, None, True, "reconnect and resume"),
        _row(_R.TOKEN_INVALID, "UNAUTHENTICATED", 4500, 401, False, "stop"),
        _row(_R.PERMISSION_DENIED, "PERMISSION_DENIED", 4501, 403, False, "stop"),
        _row(_R.PROTOCOL_VIOLATION, "INVALID_ARGUMENT", 4502, 400, False, "stop"),
        _row(_R.USER_EVICTED, "PERMISSION_DENIED", 4503, 403, False, "stop"),
        _row(_R.TOKEN_REVOKED, "PERMISSION_DENIED", 4503, 401, False, "stop"),
        _row(_R.CONNECTION_REPLACED, "ABORTED", 4504, None, False, "stop"),
        _row(_R.MESSAGE_TOO_LARGE, "INVALID_ARGUMENT", 1009, 413, False, "stop"),
        _row(_R.INTERNAL, "INTERNAL", 1011, 500, True, "reconnect with backoff"),
        _row(_R.NOT_FOUND, "NOT_FOUND", None, 404, False, "look at the id"),
        _row(
            _R.OVERLAP_REJECTED, "FAILED_PRECONDITION", None, 409, False, "send when the run ended"
        ),
        _row(_R.QUEUE_FULL, "RESOURCE_EXHAUSTED", None, 429, True, "send when a run ended"),
        _row(_R.MANAGER_MOVED, "UNAVAILABLE", None, None, True, "resolve again"),
        _row(_R.EPOCH_STALE, "FAILED_PRECONDITION", None, None, True, "resolve again"),
        _row(_R.LEASE_EXPIRED, "FAILED_PRECONDITION", None, None, False, "join anew"),
        _row(_R.NODE_DRAINING, "UNAVAILABLE", None, None, True, "resolve again"),
        _row(_R.NODE_ID_IN_USE, "ALREADY_EXISTS", None, None, True, "wait for the lease to end"),
        _row(_R.PLACEMENT_UNKNOWN, "FAILED_PRECONDITION", None, None, True, "resolve again"),
        _row(_R.STORE_UNAVAILABLE, "UNAVAILABLE", None, 503, True, "try again"),
        _row(_R.POSITION_COMPACTED, "OUT_OF_RANGE", None, 410, False, "take the stream anew"),
    ]
)


class StewardError(Exception):
    """A refusal with a reason of the table. `message` is for people; no other user's data in it."""

    def __init__(self, reason: Reason, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.retry_after_ms = retry_after_ms

    @property
    def row(self) -> ErrorRow:
        return ERRORS[self.reason]
