"""The scripted edge as a process of its own, one for the folder."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def scripted_url() -> Iterator[str]:
    """Base address of a scripted edge on a free port."""
    command = [sys.executable, str(HERE / "scripted_edge.py"), "--port", "0", "--pace", "0.005"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().partition("/#")[0]
        finally:
            process.terminate()
