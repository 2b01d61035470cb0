"""Entry points: what is served, under which name, and one clear line for each mistake."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from steward.agent import agent
from steward.agent.loading import load_agents
from steward.config.settings import SettingsError

GOOD = """
from steward.agent import agent

@agent("analyst", overlap="reject", on_crash="fail")
async def analyse(run):
    return "x"

async def echo(run):
    yield run.input.text

def plain(run):
    return "y"

class Callable:
    async def __call__(self, run):
        return "z"

instance = Callable()
number = 3
nothing = lambda: 1
anonymous = lambda run: "a"
async def two(run, other):
    return ""
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "my_agents.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def _error(*entrypoints: str) -> str:
    with pytest.raises(SettingsError) as error:
        load_agents(entrypoints)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_the_first_agent_is_the_default_and_names_come_from_the_decorator(folder: Path) -> None:
    catalog = load_agents(["my_agents.py:echo", "my_agents.py:analyse"])
    assert catalog.names == ("echo", "analyst")
    assert catalog.default.name == "echo"
    assert catalog.get("") is catalog.default
    assert catalog.get("analyst") is catalog.agents[1]
    assert catalog.get("nobody") is None
    assert catalog.overlaps() == {"echo": "queue", "analyst": "reject"}
    assert catalog.agents[1].on_crash == "fail"


def test_files_modules_and_absolute_paths_are_found(folder: Path) -> None:
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text("")
    (folder / "package" / "inner.py").write_text("async def third(run): return ''\n")
    catalog = load_agents(
        [f"{folder}/my_agents.py:echo", "my_agents:analyse", "package.inner:third"]
    )
    assert catalog.names == ("echo", "analyst", "third")


def test_a_file_may_import_its_neighbours_and_shadows_no_library(folder: Path) -> None:
    (folder / "json.py").write_text("from neighbour import text\nasync def a(run): return text\n")
    (folder / "neighbour.py").write_text("text = 'n'\n")
    assert load_agents(["json.py:a"]).names == ("a",)
    assert Path(sys.modules["json"].__file__ or "").parent != folder


def test_kinds_are_seen_through_objects(folder: Path) -> None:
    catalog = load_agents([f"my_agents.py:{name}" for name in ("echo", "plain", "instance")])
    assert [one.kind for one in catalog.agents] == ["stream", "plain", "coroutine"]
    assert catalog.agents[2].name == "Callable"


def test_an_agent_stays_a_function() -> None:
    async def original(run: object) -> None: ...

    assert agent("name")(original) is original


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("missing.py:a", "there is no file"),
        ("missing_module:a", "there is no module 'missing_module'"),
        ("my_agents.missing:a", "there is no module"),
        ("my_agents.py:nobody", "my_agents.py has no 'nobody'"),
        ("my_agents.py", "use path/to/file.py:name or module:name"),
        ("my_agents.py:", "use path/to/file.py:name or module:name"),
        (":echo", "use path/to/file.py:name or module:name"),
        ("my_agents.py:number", "is of type int, not a function"),
        ("my_agents.py:Callable", "is a class, not a function"),
        ("my_agents.py:nothing", "must take exactly one argument"),
        ("my_agents.py:two", "must take exactly one argument"),
        ("my_agents.py:anonymous", "give it one with @agent"),
        ("broken.py:a", "broken.py:2): ZeroDivisionError: division by zero"),
        ("wrong.py:a", "wrong.py:1): SyntaxError"),
        ("leaves.py:a", "SystemExit"),
        ("lacks.py:a", "lacks.py:1): ModuleNotFoundError: No module named 'absent_library'"),
        ("policy.py:a", "overlap is one of queue, reject"),
        ("naming.py:a", "agent name 'a b'"),
        ("bare.py:a", "with parentheses"),
    ],
)
def test_each_mistake_is_one_clear_line(folder: Path, entry: str, expected: str) -> None:
    (folder / "broken.py").write_text("x = 1\n1 / 0\n")
    (folder / "wrong.py").write_text("def (:\n")
    (folder / "leaves.py").write_text("raise SystemExit(3)\n")
    (folder / "lacks.py").write_text("import absent_library\n")
    decorated = "from steward.agent import agent\n{}\nasync def a(run): ...\n"
    (folder / "policy.py").write_text(decorated.format("@agent('a', overlap='sometimes')"))
    (folder / "naming.py").write_text(decorated.format("@agent('a b')"))
    (folder / "bare.py").write_text(decorated.format("@agent"))
    text = _error(entry)
    assert expected in text
    assert entry in text


def test_a_name_that_is_taken_is_refused(folder: Path) -> None:
    (folder / "other.py").write_text("async def echo(run): return ''\n")
    text = _error("my_agents.py:echo", "other.py:echo")
    assert "other.py:echo" in text and "my_agents.py:echo" in text and "'echo'" in text


def test_no_agent_at_all_is_refused() -> None:
    assert "no agent" in _error()


@pytest.mark.parametrize("overlap", ["interrupt", "steer", "latest", "parallel"])
def test_an_agent_with_an_overlap_that_is_not_available_yet_is_not_served(
    folder: Path, overlap: str
) -> None:
    source = f"from steward.agent import agent\n@agent('a', overlap='{overlap}')\ndef a(run): ...\n"
    (folder / "later.py").write_text(source)
    text = _error("later.py:a")
    assert f"{overlap!r}, not available yet" in text
