"""The JavaScript SDK and the page's model under Node: vectors, rules, real sockets."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
NODE = shutil.which("node")

needs_node = pytest.mark.skipif(
    NODE is None,
    reason="node is not installed: THE JAVASCRIPT SDK IS NOT TESTED (Node 20 or later)",
)


def _run(path: Path, *options: str, **environment: str) -> int:
    """Run one file under `node --test` and return how many tests passed; a failure fails here."""
    assert NODE is not None
    done = subprocess.run(
        [NODE, *options, "--test", "--test-reporter=tap", str(path)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    count = re.search(r"^# pass (\d+)$", done.stdout, re.MULTILINE)
    assert count is not None
    return int(count[1])


@needs_node
@pytest.mark.parametrize(
    ("name", "at_least"),
    [
        ("client_session", 100),
        ("frames", 50),
        ("streams", 100),
        ("page_model", 10),
        ("history", 6),
        ("client", 6),
    ],
)
def test_javascript_units_pass(name: str, at_least: int) -> None:
    assert _run(HERE / f"{name}.test.mjs") >= at_least


@needs_node
def test_javascript_driver_keeps_its_promises_on_real_sockets(scripted_url: str) -> None:
    assert NODE is not None
    version = subprocess.run([NODE, "--version"], capture_output=True, text=True, check=True).stdout
    major = int(version.lstrip("v").partition(".")[0])
    options = ["--experimental-websocket"] if major < 22 else []
    assert _run(HERE / "driver.mjs", *options, STEWARD_URL=scripted_url) >= 6


def test_page_has_no_inline_script_or_style_and_no_foreign_address() -> None:
    page = (ROOT / "edge/static/index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    for path in (ROOT / "edge/static").rglob("*"):
        if path.suffix in {".js", ".css", ".html", ".svg"}:
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert "innerHTML" not in text and "insertAdjacentHTML" not in text, path
            assert not re.search(
                r"(?:src|href|import|from|url\()\s*=?\s*[\"']?(?:https?:)?//", text
            ), path
