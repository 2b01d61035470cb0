"""Agents for measuring: they emit and do nothing else. Served by `python -m tests.load.bench`.

What they emit carries the time of the verb (`time.time_ns`), so that whoever reads it on
the same machine can tell how long it took to arrive.
"""

import asyncio
import time

from steward.agent import Run

PADDING = "x" * 64
"""Makes an event about 320 bytes long, like a short piece of an answer."""


async def echo(run: Run) -> str:
    """Answers with what it was asked."""
    return run.input.text


async def burst(run: Run) -> None:
    """Emits as many events as the message says, as fast as the verbs let it."""
    for _ in range(int(run.input.text)):
        await run.emit("tick", {"at": time.time_ns(), "text": PADDING})


async def paced(run: Run) -> None:
    """`"<events> <events per second> <first delay in ms>"`: emits at that pace, never catching up
    by more than what is due."""
    events, rate, delay_ms = map(int, run.input.text.split())
    begin = time.monotonic() + delay_ms / 1000
    for number in range(events):
        await asyncio.sleep(max(0.0, begin + number / rate - time.monotonic()))
        await run.emit("tick", {"at": time.time_ns(), "text": PADDING})


async def worker(run: Run) -> str:
    """`"<tools> <ms each>"`: works through so many tool calls, and says what each one found.

    Made to be resumed: all that takes time is inside of the tools, and it says the same each time.
    """
    tools, each_ms = map(int, run.input.text.split())

    async def work(number: int) -> int:
        await asyncio.sleep(each_ms / 1000)
        return number * number

    await run.think(f"{tools} things to do")
    for number in range(tools):
        found = await run.tool("work", {"number": number}, work)
        await run.say(f"{number}: {found}. ")
    return "done"
