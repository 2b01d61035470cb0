"""The tree as the architecture tests see it: every module of the packages, parsed, not imported."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("steward", "registry_service", "agent_service", "auth_service", "edge")
GENERATED = "steward.v1"


@dataclass(frozen=True)
class Module:
    """One source file. `name` is its dotted import path."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def modules() -> dict[str, Module]:
    """Dotted name → module, generated code left out."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if not name.startswith(GENERATED):
                found[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    return found
