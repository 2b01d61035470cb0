"""What agents hand over, as JSON: strict, bounded, and with errors that name the place.

`orjson` alone would quietly turn a date into a string and NaN into null; what an agent
gets back on a later attempt would then differ from what it saw on the first. So only
JSON values pass: dict with str keys, list, tuple (an array), str, int, finite float,
bool, None. Text is always valid UTF-8 afterwards; a lone surrogate becomes `?`.
"""

import math
from typing import Any

import orjson

MAX_EVENT_BYTES = 1024 * 1024
"""Most that one event may carry; more fails the verb with ValueError."""

MAX_DEPTH = 64
MAX_ERROR_CHARS = 4096

_ATOMS = frozenset((str, int, bool, type(None)))


class _NotJson(TypeError):
    """Found on the way down; the path is filled on the way up."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path: list[str] = []


def encode(value: Any, what: str) -> bytes:
    """`value` as JSON text. `what` names it in errors, as in "the result of tool 'x'".

    Raises TypeError when it is not JSON, ValueError when it is over MAX_EVENT_BYTES.
    """
    return to_json(value, what)[0]


def to_json(value: Any, what: str) -> tuple[bytes, Any]:
    """`value` as JSON text, and as it reads back from it (a tuple is a list then).

    Raises as `encode`. A value without tuples is returned as it is.
    """
    try:
        has_tuple = _check(value, MAX_DEPTH)
        text = orjson.dumps(value)
    except _NotJson as error:
        place = "".join(reversed(error.path))
        where = f" at {place}" if place else ""
        raise TypeError(f"{what} is not JSON{where}: {error.problem}") from None
    except TypeError as error:
        raise TypeError(f"{what} is not JSON: {error}") from None
    if len(text) > MAX_EVENT_BYTES:
        raise ValueError(f"{what} is {len(text)} bytes of JSON; at most {MAX_EVENT_BYTES} are kept")
    return text, orjson.loads(text) if has_tuple else value


def clean_text(text: str) -> str:
    """`text` without what UTF-8 can't hold."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def text_of(value: Any, what: str) -> str:
    """`value` as clean text. Raises TypeError, naming `what`, for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"{what} is text, not {kind_of(value)}")
    return clean_text(value)


def fraction_of(value: float) -> float:
    """`value` if it is a number from 0 to 1. Raises TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a fraction is a number, not {kind_of(value)}")
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"a fraction is from 0 to 1, not {value}")
    return value


def kind_of(value: Any) -> str:
    """The name of its type, for errors."""
    return type(value).__name__


def describe_error(error: BaseException) -> dict[str, str]:
    """`{type, message}` of any exception, also of one whose `str()` raises."""
    try:
        message = str(error)
    except Exception:
        message = "(its message can't be read)"
    return {"type": type(error).__name__, "message": clean_text(message[:MAX_ERROR_CHARS])}


def _check(value: Any, depth: int) -> bool:
    """Whether a tuple is anywhere inside. Raises _NotJson."""
    if type(value) in _ATOMS:
        return False
    if depth == 0:
        raise _NotJson(f"it is nested deeper than {MAX_DEPTH}, or contains itself")
    found = False
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _NotJson(f"the key {key!r:.80} is not a string")
            if type(item) not in _ATOMS:
                try:
                    found |= _check(item, depth - 1)
                except _NotJson as error:
                    error.path.append(f"[{key!r:.80}]")
                    raise
        return found
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if type(item) not in _ATOMS:
                try:
                    found |= _check(item, depth - 1)
                except _NotJson as error:
                    error.path.append(f"[{index}]")
                    raise
        return found or isinstance(value, tuple)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _NotJson(f"{value} is no JSON number")
        return False
    if isinstance(value, (str, int)):
        return False
    raise _NotJson(f"{type(value).__name__} is no JSON type")
