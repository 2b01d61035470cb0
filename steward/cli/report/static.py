"""The part about the code: read from the tree that this command is a part of.

Nothing is imported for it but what finds the packages. Import contracts are kept or not by the
word of `lint-imports`, which is run where the source tree and that program are there; an installed
package has neither, and then the line says so.
"""

import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from steward.cli.report.lines import Line, Part, Verdict, some
from steward.cli.report.source import (
    PACKAGES,
    ROLES,
    Trees,
    import_paths,
    read_trees,
    roles_of_a_manager,
    several,
)

CONTRACTS = (
    "Services never import each other",
    "steward imports no service, except steward.testing",
    "The test kit and the command line are on top",
    "Inside of steward",
    "Inside of a service",
    "Cores and the model are pure: no I/O, clock, randomness, logging, await, generated code",
    "What clients and agent authors import needs no gRPC and no generated code",
    "Managers are made by the host alone",
    "No cycles",
)
"""The import contracts that there must be, by their names in pyproject.toml."""

LINT_S = 300.0
LEAST_THINGS = 500
"""Fewer public things than this are not the whole tree."""


def find_packages() -> dict[str, Path]:
    """Where the installed packages are, by name; those that are not there are left out."""
    found = {}
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            found[package] = Path(next(iter(spec.submodule_search_locations)))
    return found


def static_lines(roots: Mapping[str, Path] | None = None) -> list[Line]:
    """The lines about the code at `roots` (package → directory; default: what is installed)."""
    roots = find_packages() if roots is None else roots
    missing = [package for package in PACKAGES if package not in roots]
    how = f"the syntax of every file of {', '.join(roots)}, loaded or not"
    try:
        trees = read_trees(roots)
    except (SyntaxError, UnicodeDecodeError, OSError) as error:
        trees, missing = {}, [f"a file that can't be read: {error}"]
    if missing:
        why = (f"not here: {', '.join(missing)}",)
        lines = [
            Line(line_id, Part.STATIC, what, Verdict.NOT_CHECKED, how, why)
            for line_id, what in (_PATHS, _CLASS)
        ]
    else:
        lines = [_import_paths(trees, how), _manager_class(trees, how)]
    return [*lines, _contracts(roots)]


_PATHS = ("import-paths", "every public thing has exactly one import path")
_CLASS = ("manager-class", "one class is the manager, and one function makes it")
_CONTRACTS = ("contracts", "every import contract is there, and is kept")


def _import_paths(trees: Trees, how: str) -> Line:
    paths = import_paths(trees)
    wrong = several(paths)
    told = [f"{thing}: {' and '.join(sorted(where))}" for thing, where in sorted(wrong.items())]
    if len(paths) < LEAST_THINGS:
        told.append(f"only {len(paths)} public things were found: this is not the whole tree")
    verdict = Verdict.BROKEN if told else Verdict.KEPT
    counted = f"{len(paths)} public things in {len(trees)} modules"
    return Line(*_head(_PATHS), verdict, how, (counted, *some(told)))


def _manager_class(trees: Trees, how: str) -> Line:
    found = roles_of_a_manager(trees)
    told = [
        f"{role}: {' and '.join(sorted(found.get(role, ()))) or 'nobody'};"
        f" should be {' and '.join(sorted(who))}"
        for role, who in ROLES.items()
        if found.get(role, set()) != who
    ]
    verdict = Verdict.BROKEN if told else Verdict.KEPT
    kept = [f"{role}: {', '.join(sorted(who))}" for role, who in ROLES.items() if not told]
    return Line(*_head(_CLASS), verdict, how, some([*told, *kept]))


def _contracts(roots: Mapping[str, Path]) -> Line:
    """Whether the contracts are there, and what `lint-imports` says of them."""
    tree = roots["steward"].parent if "steward" in roots else None
    config = tree / "pyproject.toml" if tree is not None else None
    if tree is None or config is None or not config.is_file():
        why = "not checked here: this is an installed package without its source tree"
        return Line(*_head(_CONTRACTS), Verdict.NOT_CHECKED, "lint-imports", (why,))
    try:
        there = _contract_names(config)
    except (tomllib.TOMLDecodeError, OSError) as error:
        return Line(*_head(_CONTRACTS), Verdict.BROKEN, "lint-imports", (f"{config}: {error}",))
    how = f"pyproject.toml has all {len(CONTRACTS)} by name, and lint-imports was run on the tree"
    gone = [f"there is no contract {name!r}" for name in CONTRACTS if name not in there]
    program = Path(sys.executable).with_name("lint-imports")
    if not program.is_file():
        verdict = Verdict.BROKEN if gone else Verdict.NOT_CHECKED
        why = "not checked here: lint-imports is not installed beside this Python"
        return Line(*_head(_CONTRACTS), verdict, how, (*gone, why))
    code, said = _lint(program, tree)
    told = [*gone, *(_what_is_broken(said) if code else ())]
    verdict = Verdict.BROKEN if code or gone else Verdict.KEPT
    counted = next((line for line in said if line.startswith("Contracts:")), f"exit code {code}")
    return Line(*_head(_CONTRACTS), verdict, how, (counted, *some(told)))


def _what_is_broken(said: list[str]) -> list[str]:
    """The contracts that are broken, and after them by what."""
    names = [line for line in said if line.endswith("BROKEN")]
    at = next((number for number, line in enumerate(said) if line == "Broken contracts"), None)
    details = [line for line in said[at + 1 :] if line.strip("-")] if at is not None else said[-5:]
    return [*names, *details]


def _contract_names(config: Path) -> set[str]:
    settings = tomllib.loads(config.read_text(encoding="utf-8"))
    contracts = settings.get("tool", {}).get("importlinter", {}).get("contracts", [])
    return {str(contract.get("name", "")) for contract in contracts}


def _lint(program: Path, tree: Path) -> tuple[int, list[str]]:
    """The exit code of lint-imports on a tree, and what it said."""
    try:
        # With -c and the tree first on the path: the code that is looked at, not another one.
        ran = subprocess.run(
            [program, "--config", "pyproject.toml", "--no-cache"],
            cwd=tree,
            env={"PYTHONPATH": str(tree), "NO_COLOR": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=LINT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, [f"lint-imports could not be run: {error}"]
    return ran.returncode, [line.strip() for line in (ran.stdout + ran.stderr).splitlines()]


def _head(line: tuple[str, str]) -> tuple[str, Part, str]:
    return line[0], Part.STATIC, line[1]
