"""Agents of the end-to-end tests. What they do is in the text of the message."""

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
    """`"<file> <ms each>"`: tool calls one after the other, until `<file>.enough` is there.

    So a test decides when the run ends, however slow the machine is. Each call, when it starts,
    writes a line `<epoch> <number>` to the file, and the last one makes `<file>.ended`: what has
    really been done, whatever the stream says.
    """
    name, each_ms = run.input.text.split()

    async def work(number: int) -> bool:
        note(Path(name), f"{run.epoch} {number}")
        await asyncio.sleep(int(each_ms) / 1000)
        return not is_enough(name)

    await run.think("much to do")
    number = 0
    while await run.tool("work", {"number": number}, work):
        await run.say(f"{number} ")
        number += 1
    return "done"


def is_enough(name: str) -> bool:
    """Whether this is the last call; if so, `<file>.ended` is made."""
    if not Path(f"{name}.enough").exists():
        return False
    Path(f"{name}.ended").touch()
    return True


def note(file: Path, line: str) -> None:
    """Append a line in one write, which is whole or absent whatever becomes of the process."""
    with file.open("a") as lines:
        lines.write(f"{line}\n")
