"""What a client may send on a socket: parsed, checked, and made into values.

Pure and total: every byte string ends as a message or as `MessageRefused`. Nesting and
size bombs are refused before anything walks them. Identity never comes from a body:
a `user_id` or `tenant_id` in it is refused, not ignored. Unknown other fields are ignored,
so that clients may be newer than the edge.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import orjson

from edge.core.commands import CancelRun, SubmitInput, SubmitMessage
from edge.core.resume import MAX_SEQUENCE, is_id
from steward.model.keys import DEFAULT_THREAD

MAX_DEPTH: Final = 64
MAX_TOKEN_CHARACTERS: Final = 8192
OVERLAPS: Final = frozenset({"queue", "reject", "interrupt", "steer", "latest", "parallel"})
_PING_BEGIN: Final = b'{"type":"ping"'


class MessageRefused(Exception):
    """A message against the protocol. `ref` is the client's `id`, where there was a usable one.

    `names_user`: it said whom it is of, which only the token may.
    """

    def __init__(self, message: str, ref: str = "", *, names_user: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.ref = ref
        self.names_user = names_user


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """The client has everything up to `sequence`."""

    sequence: int
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Authenticate:
    """A newer token of the same user."""

    token: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered with the same `t`."""

    t: int | float


ClientMessage = SubmitMessage | CancelRun | SubmitInput | Acknowledge | Authenticate | Ping


def parse_message(payload: bytes) -> ClientMessage:
    """The message that `payload` is. Raises MessageRefused."""
    fields = parse_object(payload)
    kind = fields.get("type")
    parse = _PARSERS.get(kind) if isinstance(kind, str) else None
    if parse is None:
        raise MessageRefused("no message of this type; see type in the protocol", _ref(fields))
    return parse(fields)


def parse_ping(payload: bytes) -> int | float | None:
    """The `t` of what `parse_message` takes for a `Ping`, if the message begins with its type.

    None for everything else, the refused too: `parse_message` says what it is.
    """
    if not payload.startswith(_PING_BEGIN):
        return None
    try:
        fields = parse_object(payload)
    except MessageRefused:
        return None
    t = fields.get("t")
    kind = type(t)
    return t if (kind is int or kind is float) and fields["type"] == "ping" else None


def parse_user_message(payload: bytes) -> SubmitMessage:
    """The body of `POST /v1/messages`, where `type` may be left out. Raises MessageRefused."""
    fields = parse_object(payload)
    if fields.get("type", "user_message") != "user_message":
        raise MessageRefused("type is not user_message", _ref(fields))
    return _user_message(fields)


def parse_object(payload: bytes) -> dict[str, Any]:
    """A JSON object without an identity in it. Raises MessageRefused."""
    try:
        fields = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise MessageRefused("not JSON") from None
    if not isinstance(fields, dict):
        raise MessageRefused("not a JSON object")
    # Each level has a bracket of its own: with so few of them there is nothing to walk.
    if payload.count(b"{") + payload.count(b"[") > MAX_DEPTH and _too_deep(fields):
        raise MessageRefused(f"nested deeper than {MAX_DEPTH}", _ref(fields))
    if "user_id" in fields or "tenant_id" in fields:
        name = "user_id" if "user_id" in fields else "tenant_id"
        text = f"{name} comes from the token; leave it out"
        raise MessageRefused(text, _ref(fields), names_user=True)
    return fields


def _too_deep(value: object) -> bool:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(v for v in item.values() if isinstance(v, dict | list))
            elif isinstance(item, list):
                inner.extend(v for v in item if isinstance(v, dict | list))
        if not inner:
            return False
        level = inner
    return True


def _ref(fields: dict[str, Any]) -> str:
    value = fields.get("id")
    return value if isinstance(value, str) and is_id(value) else ""


def _id(fields: dict[str, Any], name: str, default: str | None = None) -> str:
    if name not in fields and default is not None:
        return default
    value = fields.get(name)
    if not isinstance(value, str) or not is_id(value):
        raise MessageRefused(f"{name} is not 1 to 128 printable characters", _ref(fields))
    return value


def _user_message(fields: dict[str, Any]) -> SubmitMessage:
    ref = _id(fields, "id")
    content = fields.get("content")
    parts = content if isinstance(content, list) else None
    if not isinstance(content, str) and parts is None:
        raise MessageRefused("content is not a string or a list of parts", ref)
    if parts is not None and not all(isinstance(part, dict) for part in parts):
        raise MessageRefused("a part of content is not an object", ref)
    overlap = fields.get("overlap", "")
    if "overlap" in fields and (not isinstance(overlap, str) or overlap not in OVERLAPS):
        raise MessageRefused(f"overlap is not one of {', '.join(sorted(OVERLAPS))}", ref)
    return SubmitMessage(
        id=ref,
        content=orjson.dumps(content),
        thread_id=_id(fields, "thread_id", DEFAULT_THREAD),
        agent=_id(fields, "agent", ""),
        overlap=overlap,
        trace=trace if isinstance(trace := fields.get("trace"), str) else "",
    )


def _cancel(fields: dict[str, Any]) -> CancelRun:
    command = CancelRun(_id(fields, "run_id", ""), _id(fields, "thread_id", ""))
    if bool(command.run_id) is bool(command.thread_id):
        raise MessageRefused("cancel needs run_id or thread_id, one of them", _ref(fields))
    return command


def _user_input(fields: dict[str, Any]) -> SubmitInput:
    request_id = _id(fields, "request_id")
    if "value" not in fields:
        raise MessageRefused("value is missing", _ref(fields))
    return SubmitInput(request_id, orjson.dumps(fields["value"]))


def _acknowledge(fields: dict[str, Any]) -> Acknowledge:
    sequence, digest = fields.get("sequence"), fields.get("digest", "")
    if type(sequence) is not int or not 0 <= sequence <= MAX_SEQUENCE:
        raise MessageRefused("sequence is not a sequence", _ref(fields))
    if not isinstance(digest, str):
        raise MessageRefused("digest is not a string", _ref(fields))
    return Acknowledge(sequence, digest)


def _authenticate(fields: dict[str, Any]) -> Authenticate:
    token = fields.get("token")
    if not isinstance(token, str) or not 0 < len(token) <= MAX_TOKEN_CHARACTERS:
        raise MessageRefused("token is not a token", _ref(fields))
    return Authenticate(token)


def _ping(fields: dict[str, Any]) -> Ping:
    t = fields.get("t")
    if type(t) is not int and type(t) is not float:
        raise MessageRefused("t is not a number", _ref(fields))
    return Ping(t)


_PARSERS: Final[dict[str, Callable[[dict[str, Any]], ClientMessage]]] = {
    "user_message": _user_message,
    "cancel": _cancel,
    "user_input": _user_input,
    "ack": _acknowledge,
    "auth": _authenticate,
    "ping": _ping,
}
