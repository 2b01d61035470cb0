"""Who may import what: the contracts, and exactly one import path for each thing."""

import ast
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

FACADES = frozenset({"steward", "steward.agent", "steward.client"})


class Module(Protocol):
    """As in conftest."""

    name: str
    path: Path
    tree: ast.Module
    is_package: bool


Modules = dict[str, Module]


def test_import_contracts_are_kept(root: Path) -> None:
    answer = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=root,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout


def test_every_thing_is_imported_by_its_one_path(modules: Modules) -> None:
    """That is the facade where one offers it, for all outside of that package; else its home."""
    offers = {
        _home(source, name, modules): facade
        for facade in FACADES & modules.keys()
        for source, name in _names_imported_from(modules[facade], modules)
    }
    detours = []
    for module in modules.values():
        for source, name in _names_imported_from(module, modules):
            if f"{source}.{name}" in modules or module.name in FACADES:
                continue
            home = _home(source, name, modules)
            facade = offers.get(home)
            inside = facade is not None and f"{module.name}.".startswith(f"{facade}.")
            right = home if facade is None or inside else f"{facade}.{name}"
            if f"{source}.{name}" != right:
                detours.append(f"{module.name} imports {source}.{name}; its path is {right}")
    assert detours == []


def test_only_facades_export_what_others_define(modules: Modules) -> None:
    exporting = [
        f"{module.name} exports {name}"
        for module in modules.values()
        if module.name not in FACADES
        for name in _exported(module) - _defined_in(module)
    ]
    assert exporting == []


def test_packages_that_are_no_facade_import_nothing(modules: Modules) -> None:
    """An import in `__init__.py` would make a second path to what it brings in."""
    importing = [
        f"{module.name} imports {name} from {source}"
        for module in modules.values()
        if module.is_package and module.name not in FACADES and not _defined_in(module)
        for source, name in _names_imported_from(module, modules)
    ]
    assert importing == []


def test_no_name_is_offered_by_two_facades(modules: Modules) -> None:
    paths = defaultdict(set)
    for facade in sorted(FACADES & modules.keys()):
        for source, name in _names_imported_from(modules[facade], modules):
            if not name.startswith("_"):
                paths[_home(source, name, modules)].add(f"{facade}.{name}")
    assert {thing: where for thing, where in paths.items() if len(where) > 1} == {}


def test_no_relative_and_no_star_imports(modules: Modules) -> None:
    bad = [
        f"{module.name}:{node.lineno}"
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom)
        and (node.level > 0 or any(alias.name == "*" for alias in node.names))
    ]
    assert bad == []


def _names_imported_from(module: Module, modules: Modules) -> Iterator[tuple[str, str]]:
    """(module, name) for each `from module import name` of our own modules."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                yield node.module, alias.name


def _home(source: str, name: str, modules: Modules) -> str:
    """Where a name that a facade offers is defined in the end."""
    while name not in _defined_in(modules[source]):
        onward = [s for s, n in _names_imported_from(modules[source], modules) if n == name]
        if not onward:
            break
        source = onward[0]
    return f"{source}.{name}"


def _exported(module: Module) -> set[str]:
    """Names that a module passes on: in `__all__`, or imported `as` themselves."""
    names: set[str] = set()
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            names |= set(ast.literal_eval(node.value))
        if isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.name for alias in node.names if alias.asname == alias.name}
    return names


def _defined_in(module: Module) -> set[str]:
    """Names that a module binds at its top level other than by importing."""
    names: set[str] = set()
    for node in _top_level(module.tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                names |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names - {"__all__"}


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _top_level(node.body)
            yield from _top_level(node.orelse)
