"""The wire vectors, read once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTDATA = Path(__file__).parents[3] / "protos" / "testdata"


@pytest.fixture(scope="session")
def vectors() -> Callable[[str], dict[str, Any]]:
    """Reads `protos/testdata/<name>.json`."""

    def read(name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((TESTDATA / f"{name}.json").read_text("utf-8"))
        return content

    return read
