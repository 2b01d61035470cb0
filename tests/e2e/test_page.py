"""The chat page in a real browser, against a real cluster: what a person would see is asserted.

Drives headless Chromium by its DevTools protocol over one WebSocket. Skipped, loudly, where no
Chromium is installed. Each test leaves a screenshot, `page.png`, in its tmp_path.
"""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--window-size=1360,860 --remote-debugging-port=0"
).split()
DEADLINE_S = 30.0
GOLDEN = ["started", "thinking", "tool_executing", "tool_completed", "completed"]
QUESTION = "Which region sold the most?"

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(
        not CHROMIUM, reason="chromium is missing: THE CHAT PAGE IS NOT TESTED IN A BROWSER"
    ),
]


class Browser:
    """The DevTools connection: commands by id, and what pages complained about."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []

    async def read(self) -> None:
        """Take in answers and events until the connection ends."""
        async for message in self._socket:
            content = json.loads(message.data)
            parameters = content.get("params", {})
            if "id" in content:
                self._answers.pop(content["id"]).set_result(content)
            elif content["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(parameters["exceptionDetails"])[:800])
            elif content["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                self.complaints.append(json.dumps(parameters["entry"])[:800])

    async def command(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result; fails when the browser refuses it."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        command = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(command | ({"sessionId": session} if session else {}))
        answer = await asyncio.wait_for(self._answers[number], DEADLINE_S)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, url: str) -> "Tab":
        """A new tab at this address."""
        target = await self.command("Target.createTarget", url="about:blank")
        attached = await self.command(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        tab = Tab(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            await self.command(f"{domain}.enable", tab.session)
        await self.command("Page.navigate", tab.session, url=url)
        return tab


class Tab:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser = browser
        self.session = session

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression; None when it throws."""
        answer = await self.browser.command(
            "Runtime.evaluate", self.session, expression=expression, returnByValue=True
        )
        return None if "exceptionDetails" in answer else answer["result"].get("value")

    async def until(self, expression: str) -> Any:
        """The first true value of an expression; fails after the deadline."""
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            if value := await self.evaluate(expression):
                return value
            await asyncio.sleep(0.05)
        text = await self.evaluate("document.body.innerText")
        raise AssertionError(f"never true: {expression}\n{text}\n{self.browser.complaints}")

    async def until_live(self) -> None:
        await self.until("document.querySelector('#status').dataset.state === 'open'")

    async def until_done(self, runs: int) -> None:
        """Wait until the thread shows this many runs, all of them over."""
        done = "document.querySelectorAll('.run[data-status=done]').length"
        await self.until(
            f"{done} === {runs} && document.querySelectorAll('.run').length === {runs}"
        )

    async def type(self, text: str) -> None:
        """Type into the message field and press Enter, as a person would."""
        await self.evaluate("document.querySelector('#composer-text').focus()")
        await self.browser.command("Input.insertText", self.session, text=text)
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            await self.browser.command("Input.dispatchKeyEvent", self.session, type=kind, **key)

    async def steps(self) -> list[str]:
        """Kinds of the entries in the newest timeline."""
        entries = "document.querySelectorAll('.run:last-child .entry')"
        kinds: list[str] = await self.evaluate(f"[...{entries}].map(e => e.dataset.kind)")
        return kinds

    async def shown(self) -> str:
        """All text of the conversation, folded or not."""
        text: str = await self.evaluate("document.querySelector('#items').textContent")
        return text

    async def fact(self, name: str) -> str:
        """A line of the inspector."""
        row = "[...document.querySelectorAll('#inspector-list > div')]"
        found = f"{row}.find(r => r.firstChild.textContent === {json.dumps(name)})"
        text: str = await self.evaluate(f"{found}?.lastChild.textContent ?? ''")
        return text

    async def screenshot(self, path: Path) -> None:
        answer = await self.browser.command("Page.captureScreenshot", self.session)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(answer["data"]))


@asynccontextmanager
async def chromium(profile: Path) -> AsyncIterator[Browser]:
    """A browser with a fresh profile, ended with the block."""
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={profile}",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = await asyncio.wait_for(_devtools_address(profile), DEADLINE_S)
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(address, max_msg_size=64 << 20) as socket,
        ):
            browser = Browser(socket)
            reader = asyncio.create_task(browser.read())
            try:
                yield browser
            finally:
                await browser.command("Browser.close")
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), DEADLINE_S)


async def _devtools_address(profile: Path) -> str:
    """Where the browser listens: it writes port and path into its profile when it is up."""
    port_file = profile / "DevToolsActivePort"
    while True:
        lines = port_file.read_text().split() if port_file.is_file() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        await asyncio.sleep(0.05)


def has_in_order(kinds: list[str], wanted: list[str]) -> bool:
    """Whether `wanted` is a subsequence of `kinds`."""
    rest = iter(kinds)
    return all(kind in rest for kind in wanted)


async def test_two_tabs_show_the_same_run_with_its_five_events(
    cluster: Any, tmp_path: Path
) -> None:
    async with chromium(tmp_path / "profile") as browser:
        one = await browser.open(f"{cluster.url}/#login={cluster.login_code}")
        await one.until_live()
        assert await one.evaluate("location.href") == f"{cluster.url}/"
        # The second tab has no code of its own: it is let in by the first.
        two = await browser.open(cluster.url)
        await two.until_live()

        await one.type(QUESTION)
        await one.until_done(1)
        await two.until_done(1)
        assert has_in_order(await one.steps(), GOLDEN)
        assert has_in_order(await two.steps(), GOLDEN)
        answer = await one.evaluate("document.querySelector('.run .answer').textContent")
        assert "South" in answer
        assert await one.shown() == await two.shown()
        assert (await one.fact("stream rules")).startswith("kept by")
        assert (await two.fact("stream rules")).startswith("kept by")

        await two.type("What is 12.5% of 8640?")
        await one.until_done(2)
        await two.until_done(2)
        assert "1080" in await one.evaluate("document.querySelector('.run:last-child').textContent")

        # History: after a reload the same is there, made from the stored events.
        before = await one.shown()
        await browser.command("Page.reload", one.session)
        await one.until_done(2)
        assert await one.shown() == before
        await one.screenshot(tmp_path / "page.png")
        assert browser.complaints == []


async def test_page_goes_on_when_a_node_and_then_the_edge_are_killed(
    cluster: Any, tmp_path: Path
) -> None:
    async with chromium(tmp_path / "profile") as browser:
        tab = await browser.open(f"{cluster.url}/#login={cluster.login_code}")
        await tab.until_live()
        await tab.type(QUESTION)
        await tab.until_done(1)
        node, epoch = await tab.fact("node"), int(await tab.fact("epoch"))

        cluster.kill(node)
        await tab.type("What is 12.5% of 8640?")
        await tab.until_done(2)
        assert int(await tab.fact("epoch")) > epoch

        cluster.kill("edge-0")
        await tab.until("document.querySelector('#status').dataset.state === 'resuming'")
        await tab.type("What time is it?")
        await tab.until("document.querySelectorAll('#pending .bubble').length === 1")
        await tab.until_live()
        await tab.until_done(3)
        assert await tab.fact("resume") == "resumed"
        assert (await tab.fact("stream rules")).startswith("kept by")
        await tab.screenshot(tmp_path / "page.png")
