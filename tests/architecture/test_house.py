"""The house: which folders there are, and what every module says of itself."""

import ast
import re
import subprocess
from pathlib import Path
from typing import Protocol

FOLDERS = {
    ".ci",
    "agent_service",
    "auth_service",
    "deploy",
    "docs",
    "edge",
    "protos",
    "registry_service",
    "steward",
    "tests",
}
NO_NAMES = frozenset({"utils", "util", "common", "helpers", "helper", "misc", "base"})
MAX_LINES = 600


class Module(Protocol):
    """As in conftest."""

    name: str
    path: Path
    tree: ast.Module


Modules = dict[str, Module]


def test_the_folders_at_the_top_are_exactly_these(root: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if listed.returncode == 0:
        paths = [Path(line) for line in listed.stdout.splitlines()]
        folders = {path.parts[0] for path in paths if len(path.parts) > 1}
    else:  # An unpacked archive: what is ignored can't be told apart by name alone.
        hidden = {".git", ".venv", ".steward"}
        folders = {
            path.name
            for path in root.iterdir()
            if path.is_dir()
            and path.name not in hidden
            and not path.name.endswith(("cache", ".egg-info"))
        }
    assert folders == FOLDERS


def test_every_module_says_what_it_is_for(modules: Modules) -> None:
    silent = [
        module.name
        for module in modules.values()
        if module.tree.body and not ast.get_docstring(module.tree)
    ]
    assert silent == []


def test_no_module_is_called_after_what_it_is_not(modules: Modules) -> None:
    assert [name for name in modules if NO_NAMES & set(name.split("."))] == []


def test_modules_are_not_longer_than_they_can_explain(modules: Modules) -> None:
    """A module of over 600 lines says in its docstring why it is long."""
    too_long = [
        module.name
        for module in modules.values()
        if len(module.path.read_text(encoding="utf-8").splitlines()) > MAX_LINES
        and not re.search(r"\b(long|length)\b", ast.get_docstring(module.tree) or "")
    ]
    assert too_long == []


def test_no_module_swallows_everything(modules: Modules) -> None:
    bare = [
        f"{module.name}:{node.lineno}"
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert bare == []


def test_no_inheritance_from_our_own_classes_is_deeper_than_one(modules: Modules) -> None:
    """A class may have one ancestor of ours; that one has none, but for ports and errors.

    Apart from the mutations of the simulation: each is the part that it breaks, less one guard; and
    from docs/decisions/0009.
    """
    parents = {
        node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
        for module in modules.values()
        if module.name != "steward.testing.mutations"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }
    outside = {"Protocol", "Exception", "StrEnum", "NamedTuple"}

    def depth(name: str) -> int:
        bases = [base for base in parents.get(name, []) if base in parents and base not in outside]
        return 1 + max(map(depth, bases)) if bases else 0

    assert [name for name in parents if depth(name) > 1] == ["MergingConnection"]


def test_every_link_of_the_documentation_leads_somewhere(root: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    pages = [root / name for name in listed.splitlines() if (root / name).is_file()]
    links = [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if "://" not in target
    ]
    assert links
    dead = [
        f"{page.relative_to(root)}: {to}" for page, to in links if not (page.parent / to).exists()
    ]
    assert dead == []


def test_every_make_target_of_the_documentation_exists(root: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    pages = [root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md")]
    named = {
        (str(page.relative_to(root)), target)
        for page in pages
        for target in re.findall(r"(?:`|^|&& )make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert named
    assert sorted(f"{page}: make {target}" for page, target in named if target not in targets) == []
