"""Agents of the end-to-end tests. How much they do is in the text of the message."""

import asyncio
from pathlib import Path

from steward.agent import Run


async def counter(run: Run) -> str:
    """`"<numbers> <ms each>"`: says numbers from 0 on, at that pace."""
    numbers, each_ms = map(int, run.input.text.split())
    await run.think("counting")
    for number in range(numbers):
        await run.say(f"{number} ")
        await asyncio.sleep(each_ms / 1000)
    return "counted"


async def worker(run: Run) -> str:
    """`"<file> <tools> <ms each>"`: tool calls one after the other.

    Each one, when it starts, writes a line `<epoch> <number>` to the file: what has really been
    done, whatever the stream says.
    """
    name, tools, each_ms = run.input.text.split()
    file = Path(name)

    async def work(number: int) -> int:
        note(file, f"{run.epoch} {number}")
        await asyncio.sleep(int(each_ms) / 1000)
        return number * number

    await run.think(f"{tools} things to do")
    for number in range(int(tools)):
        found = await run.tool("work", {"number": number}, work)
        await run.say(f"{number}: {found}. ")
    return "done"


def note(file: Path, line: str) -> None:
    """Append a line in one write, which is whole or absent whatever becomes of the process."""
    with file.open("a") as lines:
        lines.write(f"{line}\n")
