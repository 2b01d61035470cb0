"""What an agent is: a function of one argument, with a name and two policies.

`@agent` leaves the function as it is and notes name and policies on it, so that it can
be called in a test like any other function. A function without the decorator is an
agent under its own name with the default policies.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, get_args

from steward.agent.run import is_async

Overlap = Literal["queue", "reject", "interrupt", "steer", "latest", "parallel"]
"""What happens to a message that arrives while a run of its thread is active."""

AfterCrash = Literal["resume", "fail"]
"""What a new manager does with a run that it finds open."""

_SERVED: tuple[Overlap, ...] = ("queue", "reject")
"""What this version can do; an agent with another policy would be refused at each message."""

_NOTE = "__steward_agent__"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class _Note:
    name: str | None
    overlap: Overlap
    on_crash: AfterCrash


@dataclass(frozen=True, slots=True)
class AgentDefinition:
    """An agent that can be served.

    `kind` says how it is called: `coroutine`, `stream` (an async generator of text), or
    `plain` (a function or generator that runs in a thread).
    """

    name: str
    function: Callable[[Any], Any]
    overlap: Overlap = "queue"
    on_crash: AfterCrash = "resume"

    @property
    def kind(self) -> Literal["coroutine", "stream", "plain"]:
        if is_async(self.function):
            return "coroutine"
        function: Any = self.function
        while isinstance(function, partial):
            function = function.func
        call = getattr(function, "__call__", None)  # noqa: B004 (the method itself is asked)
        if inspect.isasyncgenfunction(function) or inspect.isasyncgenfunction(call):
            return "stream"
        return "plain"


def agent(
    name: str | None = None, *, overlap: Overlap = "queue", on_crash: AfterCrash = "resume"
) -> Callable[[Function], Function]:
    """Name an agent and set its policies. Without a name, the function's own is used.

    Raises ValueError for a name that is not 1 to 64 of `A-Z a-z 0-9 _ . -`, or an unknown policy.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError('write @agent("name") or @agent(), with parentheses')
    if name is not None and not _NAME.fullmatch(name):
        raise ValueError(f"agent name {name!r}: use 1 to 64 of A-Z a-z 0-9 _ . -")
    if overlap not in get_args(Overlap):
        raise ValueError(f"overlap is one of {', '.join(get_args(Overlap))}, not {overlap!r}")
    if on_crash not in get_args(AfterCrash):
        raise ValueError(f"on_crash is one of {', '.join(get_args(AfterCrash))}, not {on_crash!r}")

    def note(function: Function) -> Function:
        setattr(function, _NOTE, _Note(name, overlap, on_crash))
        return function

    return note


def define(function: Any) -> AgentDefinition:
    """The definition of what an author gave. Raises ValueError when it can't be an agent."""
    if not callable(function) or inspect.isclass(function):
        what = "a class" if inspect.isclass(function) else f"of type {type(function).__name__}"
        raise ValueError(f"is {what}, not a function")
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise ValueError("must take exactly one argument, the run") from None
    note = getattr(function, _NOTE, None) or _Note(None, "queue", "resume")
    if note.overlap not in _SERVED:
        raise ValueError(
            f"has the overlap {note.overlap!r}, not available yet; use queue or reject"
        )
    name = note.name or _own_name(function)
    if not _NAME.fullmatch(name):
        raise ValueError(f"has no usable name ({name!r}); give it one with @agent")
    return AgentDefinition(name, function, note.overlap, note.on_crash)


def _own_name(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))
