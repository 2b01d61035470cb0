"""What is logged: constant messages, with fields beside them; and every error says what to do."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

LEVELS = frozenset({"debug", "info", "warning", "error", "exception", "critical"})
ERRORS = frozenset({"error", "exception", "critical"})
LOGGERS = frozenset({"_log", "log", "logger", "logging"})


class Module(Protocol):
    """As in conftest."""

    name: str
    path: Path
    tree: ast.Module


Modules = dict[str, Module]


def calls(modules: Modules) -> Iterator[tuple[str, ast.Call, str]]:
    """Where, the call, and its level, of every line that the product can log."""
    for module in modules.values():
        for node in ast.walk(module.tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LEVELS
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in LOGGERS
            ):
                yield f"{module.name}:{node.lineno}", node, node.func.attr


def field_names(call: ast.Call) -> set[str]:
    """The names in `extra=fields(...)`."""
    for keyword in call.keywords:
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Call):
            return {each.arg for each in keyword.value.keywords if each.arg}
    return set()


def test_a_message_is_a_constant_and_all_that_varies_is_a_field(modules: Modules) -> None:
    formatted = [
        where
        for where, call, _ in calls(modules)
        if len(call.args) != 1
        or not isinstance(call.args[0], ast.Constant)
        or not isinstance(call.args[0].value, str)
        or "%" in call.args[0].value
    ]
    assert formatted == []


def test_every_error_says_what_to_do(modules: Modules) -> None:
    silent = [
        where
        for where, call, level in calls(modules)
        if level in ERRORS and "do" not in field_names(call)
    ]
    assert silent == []


def test_there_are_lines_to_look_at(modules: Modules) -> None:
    """The rules above look at something: they would hold for a product that logs in another way."""
    levels = [level for _, _, level in calls(modules)]
    assert levels.count("warning") > 20
    assert sum(level in ERRORS for level in levels) > 10
