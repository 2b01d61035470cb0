"""The rules in `tests/conftest.py` work: tests that can't fail, or did not run, are not green."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def house(tmp_path: Path, root: Path) -> Path:
    shutil.copy(root / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = strict\nasyncio_default_fixture_loop_scope = function\n"
        "filterwarnings = error\n"
    )
    return tmp_path


def run(house: Path, source: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    (house / "test_it.py").write_text(source)
    clean = {name: value for name, value in os.environ.items() if name != "STEWARD_CI"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(house)],
        cwd=house,
        env={**clean, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "body",
    [
        "assert 1 == 1",
        "assert_ok()",
        "check_it()",
        "import pytest\n    with pytest.raises(ValueError): int('x')",
    ],
)
def test_a_test_that_can_fail_is_run(house: Path, body: str) -> None:
    source = f"def assert_ok(): pass\ncheck_it = assert_ok\n\n\ndef test_it():\n    {body}\n"
    answer = run(house, source)
    assert "1 passed" in answer.stdout, answer.stdout + answer.stderr


def test_a_test_that_asserts_nothing_fails_the_collection(house: Path) -> None:
    answer = run(house, "def test_it():\n    print(1 == 2)\n")
    assert answer.returncode != 0
    assert "assert nothing" in answer.stdout + answer.stderr
    assert "test_it.py::test_it" in answer.stdout + answer.stderr


def test_an_async_test_that_nobody_awaits_is_not_green(house: Path) -> None:
    answer = run(house, "async def test_it():\n    assert False\n")
    assert answer.returncode != 0


def test_a_coroutine_that_nobody_awaits_is_not_green(house: Path) -> None:
    source = "async def work(): pass\n\n\ndef test_it():\n    work()\n    assert True\n"
    assert run(house, source).returncode != 0


SKIPPED = (
    "import pytest\n\n\ndef test_it():\n    pytest.skip('no browser here')\n    assert False\n"
)


def test_a_skip_is_said_loudly(house: Path) -> None:
    answer = run(house, SKIPPED)
    assert answer.returncode == 0
    assert "1 TESTS WERE SKIPPED" in answer.stdout
    assert "no browser here" in answer.stdout


def test_a_skip_is_a_failure_in_ci(house: Path) -> None:
    answer = run(house, SKIPPED, STEWARD_CI="1")
    assert answer.returncode == 1
    assert "no browser here" in answer.stdout


EXPECTED_FAILURE = """\
import pytest


@pytest.mark.xfail(raises=ValueError, strict=True)
def test_it():
    assert int("x")
"""


def test_an_expected_failure_is_none_in_ci(house: Path) -> None:
    answer = run(house, EXPECTED_FAILURE, STEWARD_CI="1")
    assert answer.returncode == 0, answer.stdout
