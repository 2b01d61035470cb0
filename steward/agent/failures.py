"""What a later attempt of a run raises in place of what an earlier one saw.

A tool that raised has left the name of the exception and its text in the stream, and
nothing else. `recorded_error` makes an exception of these that is caught as the first
one was: `except LookupError`, and `except OwnError` of the tool's module, work on every attempt.
"""

import builtins
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn


class ToolFailed(Exception):
    """A tool call that failed in an earlier attempt of this run.

    `type` is the class name and `message` the text of what it raised then. It is an instance of
    that class too, if it is one of Python's own or one that the module of the tool function knows;
    of its attributes and arguments nothing was kept.
    """

    def __init__(self, type: str, message: str) -> None:
        # Not the next class of the order: that may want arguments which nobody has kept.
        Exception.__init__(self, message)
        self.type = type
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> Any:
        return ToolFailed, (self.type, self.message)


class NonDeterministic(RuntimeError):
    """A later attempt asks for something else under an id that an earlier one has used."""


def recorded_error(type_name: str, message: str, fn: Callable[..., Any]) -> ToolFailed:
    """The exception for a recorded failure of `fn`; the name of its class is `type_name`."""
    original = _find(type_name, fn)
    if original is not None and not issubclass(original, ToolFailed):
        try:
            error: ToolFailed = type(type_name, (ToolFailed, original), {})(type_name, message)
            return error
        except Exception:
            # A class that can't be derived from, or not made without its own arguments.
            pass
    failure: ToolFailed = type(type_name, (ToolFailed,), {})(type_name, message)
    return failure


def raise_non_deterministic(what: str) -> NoReturn:
    """Raise NonDeterministic with what differs, and what to do about it."""
    raise NonDeterministic(
        f"{what}; an agent that is resumed must ask for the same again: make what it depends on "
        "(a model's answer, the time, chance) the result of a run.step"
    )


def _find(name: str, fn: Callable[..., Any]) -> type[Exception] | None:
    while isinstance(fn, partial):
        fn = fn.func
    call: Any = fn if hasattr(fn, "__globals__") else getattr(type(fn), "__call__", None)  # noqa: B004
    for names in (getattr(call, "__globals__", {}), vars(builtins)):
        found = names.get(name)
        if isinstance(found, type) and issubclass(found, Exception) and found.__name__ == name:
            return found
    return None
