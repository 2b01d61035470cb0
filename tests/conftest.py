"""Rules for all tests: each can fail, none is skipped silently, no coroutine is left unawaited.

A test function without an assertion in its own code fails the collection: it must have an
`assert`, a `pytest.raises` or `pytest.warns`, a `pytest.fail`, or call a helper whose name
begins with `assert_` or `check_`. In CI (STEWARD_CI=1) a skip is a failure: a fresh
machine has all that the tests need.
"""

import ast
import inspect
import os
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

# Processes are started beside running gRPC servers. Its handlers of a fork are for children that go
# on with gRPC; ours become other programs at once, and the handlers can break them before.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_CLUSTERS = pytest.StashKey[list[Any]]()

ASSERTING_CALLS = frozenset({"raises", "warns", "fail"})
ASSERTING_PREFIXES = ("assert_", "check_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse tests that can't fail."""
    idle = sorted({f"  {item.nodeid}" for item in items if not _item_asserts(item)})
    if idle:
        raise pytest.UsageError("these tests assert nothing:\n" + "\n".join(idle))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Show the logs of the clusters of a failed test. In CI, turn a skip into a failure."""
    report: pytest.TestReport = yield  # type: ignore[misc]
    if report.when == "call" and report.failed:
        for cluster in item.stash.get(_CLUSTERS, []):
            report.sections.append(("cluster", cluster.logs()))
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("STEWARD_CI") == "1":
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where nothing may be missing: {report.longrepr}"
    return report  # type: ignore[return-value]


@pytest.fixture
def clusters_to_show(request: pytest.FixtureRequest) -> list[Any]:
    """Put a `LocalCluster` here and its logs are shown when the test fails."""
    clusters: list[Any] = []
    request.node.stash[_CLUSTERS] = clusters
    return clusters


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly what was not tested."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section(f"{len(skipped)} TESTS WERE SKIPPED", red=True, bold=True)
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            terminalreporter.line(f"{report.nodeid}: {reason}")


def _item_asserts(item: pytest.Item) -> bool:
    function = getattr(item, "function", None)
    return function is None or _function_asserts(inspect.unwrap(function))


@cache
def _function_asserts(function: object) -> bool:
    # Of a property test, what counts is the function that Hypothesis wraps.
    inner = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    try:
        source = textwrap.dedent(inspect.getsource(inner))
    except (OSError, TypeError):
        return False
    return source_asserts(source)


def source_asserts(source: str) -> bool:
    """Whether the code of a function contains something that can fail a test."""
    return any(_asserts(node) for node in ast.walk(ast.parse(source)))


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return name in ASSERTING_CALLS or name.startswith(ASSERTING_PREFIXES)
