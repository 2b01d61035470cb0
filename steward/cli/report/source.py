"""What the source tree says: where each public thing can be imported from, and who is a manager.

Read from the syntax trees of all files, loaded or not, so that nothing is imported for it and no
branch hides anything. Generated code is left out.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

PACKAGES = ("steward", "registry_service", "agent_service", "auth_service", "edge")
FACADES = ("steward", "steward.agent", "steward.client")
GENERATED = "steward.v1"

Trees = dict[str, ast.Module]

MANAGER = "agent_service.core.manager.Manager"
ROLES: Mapping[str, frozenset[str]] = {
    "is called one": frozenset({MANAGER}),
    "spends grants": frozenset({MANAGER}),
    "writes to the log": frozenset({MANAGER}),
    "makes appends": frozenset({"agent_service.core.outgoing.Outgoing"}),
    "numbers events": frozenset({MANAGER}),
    "makes managers": frozenset({"agent_service.host.activation.make_manager"}),
}
"""What only a manager does → the one class or function that may do it."""


def read_trees(roots: Mapping[str, Path]) -> Trees:
    """Dotted module name → syntax tree. `roots`: where each package is.

    Raises SyntaxError, UnicodeDecodeError and OSError for a file that can't be read as Python.
    """
    found = {}
    for package, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            parts = (package, *path.relative_to(root).with_suffix("").parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if not f"{name}.".startswith(f"{GENERATED}."):
                found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _top_level([*node.body, *node.orelse])


def defined(tree: ast.Module) -> set[str]:
    """Public names that a module binds other than by importing."""
    names: set[str] = set()
    for node in _top_level(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def imported(name: str, trees: Trees) -> Iterator[tuple[str, str]]:
    """(module, thing) for each of our things that a module names, however it imported it."""
    aliases: dict[str, str] = {}
    for node in ast.walk(trees[name]):
        if isinstance(node, ast.ImportFrom) and node.module in trees:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in trees:
                    aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                else:
                    yield node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in trees and alias.asname:
                    aliases[alias.asname] = alias.name
    for node in ast.walk(trees[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = aliases.get(node.value.id)
            if module is not None and f"{module}.{node.attr}" not in trees:
                yield module, node.attr


def home(module: str, thing: str, trees: Trees) -> str:
    """Where a thing is defined that `module` has under this name."""
    while thing not in defined(trees[module]):
        onward = [m for m, t in imported(module, trees) if t == thing]
        if not onward:
            break
        module = onward[0]
    return f"{module}.{thing}"


def import_paths(trees: Trees) -> dict[str, set[str]]:
    """Each public thing → the paths by which it is offered to, or taken by, others."""
    offers: dict[str, str] = {}
    for facade in FACADES:
        for module, thing in imported(facade, trees):
            if not thing.startswith("_"):
                offers.setdefault(home(module, thing, trees), f"{facade}.{thing}")
    paths: dict[str, set[str]] = {
        f"{name}.{thing}": {offers.get(f"{name}.{thing}", f"{name}.{thing}")}
        for name, tree in trees.items()
        for thing in defined(tree)
    }
    for name in trees:
        for module, thing in imported(name, trees):
            at = home(module, thing, trees)
            facade = offers.get(at, "").rpartition(".")[0]
            inside = bool(facade) and f"{name}.".startswith(f"{facade}.")
            if at in paths and not inside:
                paths[at].add(f"{module}.{thing}")
    for facade in FACADES:
        for module, thing in imported(facade, trees):
            if not thing.startswith("_"):
                paths[home(module, thing, trees)].add(f"{facade}.{thing}")
    return paths


def several(paths: dict[str, set[str]]) -> dict[str, set[str]]:
    """The things that have none or more than one."""
    return {thing: where for thing, where in paths.items() if len(where) != 1}


def roles_of_a_manager(trees: Trees) -> dict[str, set[str]]:
    """What only a manager does → the classes and functions whose code does it."""
    doing: dict[str, set[str]] = defaultdict(set)
    for name, tree in trees.items():
        if name.startswith("steward.testing"):
            continue
        for node in tree.body:
            where = f"{name}.{getattr(node, 'name', '')}"
            if isinstance(node, ast.ClassDef) and node.name.endswith("Manager"):
                # A message of this name is what an effect or an answer says about one.
                if not any(isinstance(d, ast.Call) for d in node.decorator_list):
                    doing["is called one"].add(where)
            for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
                called = call.func
                if isinstance(called, ast.Attribute) and called.attr == "spend":
                    doing["spends grants"].add(where)
                elif isinstance(called, ast.Name) and called.id == "Outgoing":
                    doing["writes to the log"].add(where)
                elif isinstance(called, ast.Name) and called.id == "WriteAppend":
                    doing["makes appends"].add(where)
                elif isinstance(called, ast.Name) and called.id == "EventEncoder":
                    doing["numbers events"].add(where)
                elif isinstance(called, ast.Name) and called.id == "Manager":
                    doing["makes managers"].add(where)
    return dict(doing)
