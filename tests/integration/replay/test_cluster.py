"""A run on a real cluster, whose node is killed in the middle of it, twice."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steward import Client
from steward.testing.local_cluster import LocalCluster

AGENT = '''
"""An agent whose tools note in a file that they ran."""

import asyncio
import os
from pathlib import Path

from steward.agent import Run, agent

NOTES = Path(__file__).with_name("notes")
HEALED = Path(__file__).with_name("healed")


def note(what: str) -> None:
    with NOTES.open("a") as notes:
        notes.write(what + "\\n")


@agent("worker")
async def worker(run: Run) -> dict[str, list[int]]:
    who = run.user

    async def square(n: int) -> int:
        note(f"{who} begin {n}")
        await asyncio.sleep(0.2)
        while n == 4 and not HEALED.exists():
            await asyncio.sleep(0.05)
        note(f"{who} end {n}")
        return n * n

    def fails(n: int) -> None:
        note(f"{who} fail {n}")
        raise LookupError(f"no {n}")

    def pick(n: int) -> str:
        note(f"{who} step {n}")
        return f"picked in {os.getpid()}"[:6]

    await run.think("Counting", step=1)
    squares = []
    for n in range(8):
        run.state["n"] = run.state.get("n", 0) + 1
        squares.append(await run.tool("square", {"n": n}, square))
        await run.say(f"{squares[-1]} ")
        try:
            await run.tool("fails", {"n": n}, fails)
        except LookupError as error:
            await run.emit("failed", str(error))
        await run.say(await run.step("pick", pick, n))
    await run.progress(1, f"{run.state['n']} in all")
    return {"squares": squares}
'''


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    (tmp_path / "worker.py").write_text(AGENT)
    found = LocalCluster.start(tmp_path, "--agent", f"{tmp_path / 'worker.py'}:worker")
    try:
        yield found.wait_ready()
    finally:
        found.end()


async def _ask(
    cluster: LocalCluster, user: str, kill_after: tuple[int, ...] = (), healed: Path | None = None
) -> list[Any]:
    """The events of a run; its node is killed when so many of its calls have completed.

    `healed` is made when both nodes are there again after the first kill.
    """
    events: list[Any] = []
    completed = 0
    healing: asyncio.Future[None] | None = None

    def heal() -> None:
        cluster.wait_healed()
        if healed is not None:
            healed.touch()

    async with Client(cluster.url, token=cluster.token(user)) as client:
        owner = json.loads(cluster.steward("where", user, "--json").stdout)["node_id"]
        other = next(name for name in ("node-0", "node-1") if name != owner)
        async for event in await client.ask("go"):
            events.append(event)
            completed += event.type == "tool_completed"
            if event.type == "tool_completed" and completed in kill_after:
                cluster.kill(owner)
                owner, other = other, owner
                healing = healing or asyncio.ensure_future(asyncio.to_thread(heal))
    if healing is not None:
        await healing
    return events


def _plain(events: list[Any]) -> list[tuple[str, Any]]:
    """Types and data, without run ids and times; a text as one, however it was cut."""
    found: list[tuple[str, Any]] = []
    for event in events:
        data = json.loads(re.sub(re.escape(event.run_id), "RUN", json.dumps(event.data)))
        data.pop("duration_ms", None)
        found.append((event.type, data))
    return found


@pytest.mark.asyncio
@pytest.mark.timeout(180)
async def test_a_run_whose_node_is_killed_is_told_as_if_nothing_had_been(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    healed = tmp_path / "healed"
    healed.touch()
    whole = await _ask(cluster, "alice")
    healed.unlink()
    cut = await _ask(cluster, "bob", (3, 12), healed)
    assert len({event.epoch for event in cut}) == 3, cluster.logs()
    assert _plain(cut) == _plain(whole), cluster.logs()
    assert cut[-1].data["outcome"] == "success"
    assert cut[-1].data["result"] == {"squares": [n * n for n in range(8)]}
    notes = (tmp_path / "notes").read_text().splitlines()
    ran = Counter(note for note in notes if note.startswith("bob"))
    assert len(ran) == 8 * 4
    twice = {note for note, count in ran.items() if count > 1}
    # What was in flight at one of the two kills: a call, or a step, and no more than that.
    assert len({note.split()[-1] for note in twice}) <= 2 and len(twice) <= 4, twice
    assert all(count <= 2 for count in ran.values())
