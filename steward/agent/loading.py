"""From entry points (`path/to/file.py:name`, `package.module:name`) to the agents of a node.

Every mistake is one SettingsError that names the entry point and what to do about it,
also when the author's module itself fails to import. Relative paths, and modules, are
looked up from the working directory. Loading runs the authors' module code, once per
file; nothing is reloaded later.
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from steward.agent.definition import AgentDefinition, define
from steward.config.settings import SettingsError

_FORM = "use path/to/file.py:name or module:name"


@dataclass(frozen=True, slots=True)
class AgentCatalog:
    """The agents of a node, in the order of their entry points; the first is the default."""

    agents: tuple[AgentDefinition, ...]

    @property
    def default(self) -> AgentDefinition:
        return self.agents[0]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(agent.name for agent in self.agents)

    def get(self, name: str) -> AgentDefinition | None:
        """The agent of this name, the default for an empty one, None for an unknown one."""
        if not name:
            return self.default
        return next((agent for agent in self.agents if agent.name == name), None)

    def overlaps(self) -> dict[str, str]:
        """The overlap policy of each agent by name."""
        return {agent.name: agent.overlap for agent in self.agents}


def load_agents(entrypoints: Sequence[str]) -> AgentCatalog:
    """Load all agents. Raises SettingsError, also for no entry point at all."""
    if not entrypoints:
        raise SettingsError(f"no agent to serve: {_FORM}")
    found: dict[str, tuple[str, AgentDefinition]] = {}
    files: dict[Path, ModuleType] = {}
    _let_import_from(Path.cwd())
    for entry in entrypoints:
        definition = _load(entry, files)
        earlier = found.get(definition.name)
        if earlier is not None:
            raise SettingsError(
                f"agent {entry}: the name {definition.name!r} is taken by {earlier[0]}; "
                "give one of them another with @agent"
            )
        found[definition.name] = (entry, definition)
    return AgentCatalog(tuple(definition for _, definition in found.values()))


def _load(entry: str, files: dict[Path, ModuleType]) -> AgentDefinition:
    target, colon, attribute = entry.rpartition(":")
    if not colon or not target or not attribute:
        raise SettingsError(f"agent {entry!r}: {_FORM}")
    if target.endswith(".py") or "/" in target:
        module = _load_file(entry, Path(target), files)
    else:
        module = _import(entry, target)
    value: Any = module
    for part in attribute.split("."):
        value = getattr(value, part, _MISSING)
        if value is _MISSING:
            raise SettingsError(f"agent {entry}: {target} has no {attribute!r}")
    try:
        return define(value)
    except ValueError as error:
        raise SettingsError(f"agent {entry}: {attribute} {error}") from None


def _load_file(entry: str, path: Path, files: dict[Path, ModuleType]) -> ModuleType:
    resolved = path.resolve()
    if resolved in files:
        return files[resolved]
    if not resolved.is_file():
        raise SettingsError(f"agent {entry}: there is no file {resolved}")
    # A name of its own, so that a file called like a library shadows nothing.
    name = f"steward_agent_{len(files)}_{resolved.stem}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise SettingsError(f"agent {entry}: {resolved} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    _let_import_from(resolved.parent)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _import_failed(entry, error) from error
    files[resolved] = module
    return module


def _import(entry: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise SettingsError(f"agent {entry}: there is no module {error.name!r}") from None
        raise _import_failed(entry, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(entry, error) from error


def _import_failed(entry: str, error: BaseException) -> SettingsError:
    """One line: the error of the author's code, and the line it comes from."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = ""
    if isinstance(error, SyntaxError):
        text = error.msg
        place = f" ({error.filename}:{error.lineno})"
    elif frames and not frames[-1].filename.startswith("<frozen"):
        place = f" ({frames[-1].filename}:{frames[-1].lineno})"
    else:
        own = [frame for frame in frames if not frame.filename.startswith("<frozen")]
        if len(own) > 1:
            place = f" ({own[-1].filename}:{own[-1].lineno})"
    return SettingsError(
        f"agent {entry}: importing it failed{place}: {type(error).__name__}: {text}"
    )


def _let_import_from(folder: Path) -> None:
    # Last, so that nothing there can shadow an installed package.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


_MISSING = object()
