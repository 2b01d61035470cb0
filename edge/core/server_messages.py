"""What an edge itself says to clients: every frame but the events, as JSON bytes.

Field names and forms are those of `event.proto`; a field that does not apply is absent.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from edge.core.commands import Accepted
from edge.core.resume import Resume, StreamHead
from steward.errors import Reason
from steward.model.keys import ConnectionId, UserKey


@dataclass(frozen=True, slots=True)
class Limits:
    """What `ready.limits` promises."""

    max_message_bytes: int
    messages_per_minute: int
    max_connections: int
    heartbeat_ms: int


def ready(
    connection_id: ConnectionId,
    user: UserKey,
    head: StreamHead,
    resume: Resume,
    token_expires_at: str,
    limits: Limits,
    *,
    merge: bool = False,
) -> bytes:
    """The first frame of a connection. `merge` echoes that it asked for merged deltas."""
    seconds = limits.heartbeat_ms / 1000
    frame: dict[str, Any] = {
        "type": "ready",
        "connection_id": connection_id,
        "tenant_id": user.tenant,
        "user_id": user.user,
        "stream_id": head.stream_id,
        "sequence": head.sequence,
        "resume": resume.value,
        "manager": {"node_id": head.node_id, "epoch": head.epoch},
        "token_expires_at": token_expires_at,
        "limits": {
            "max_message_bytes": limits.max_message_bytes,
            "messages_per_minute": limits.messages_per_minute,
            "max_connections": limits.max_connections,
            "heartbeat_seconds": int(seconds) if seconds.is_integer() else seconds,
        },
    }
    if merge:
        frame["merge"] = True
    return orjson.dumps(frame)


def accepted(answer: Accepted) -> bytes:
    """The message is in the log."""
    frame: dict[str, Any] = {
        "type": "accepted",
        "id": answer.id,
        "run_id": answer.run_id,
        "sequence": answer.sequence,
        "duplicate": answer.duplicate,
    }
    if answer.queue_position:
        frame["queue_position"] = answer.queue_position
    return orjson.dumps(frame)


def error(reason: Reason, message: str, ref: str = "", retry_after_ms: int = 0) -> bytes:
    """Something was refused; the socket stays open."""
    frame: dict[str, Any] = {"type": "error", "reason": reason.value, "message": message}
    if ref:
        frame["ref"] = ref
    if retry_after_ms:
        frame["retry_after_ms"] = retry_after_ms
    return orjson.dumps(frame)


def authenticated(token_expires_at: str) -> bytes:
    """The new token is in force."""
    return orjson.dumps({"type": "authenticated", "token_expires_at": token_expires_at})


def going_away(reconnect_after_ms: int) -> bytes:
    """A planned close follows."""
    return b'{"type":"going_away","reconnect_after_ms":%d}' % reconnect_after_ms


def pong(t: int | float) -> bytes:
    return orjson.dumps({"type": "pong", "t": t})


def heartbeat(sequence: int) -> bytes:
    """`sequence` is the last one of the stream."""
    return b'{"type":"heartbeat","sequence":%d}' % sequence
