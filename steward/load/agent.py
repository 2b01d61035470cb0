"""The agent that `steward load` sends its messages to: it emits and does nothing else.

Start a cluster with `steward up --agent steward.load.agent:load`. Each event carries the
time of the verb (`time.time_ns`), so that a client on the same machine can tell how long it took.
"""

import asyncio
import time

from steward.agent import Run

PADDING = "x" * 64
"""Makes an event about 320 bytes long, like a short piece of an answer."""

MOST_S = 3600.0


async def load(run: Run) -> str:
    """`"<seconds> <events per second> <first delay in ms>"`: emits at that pace; 0: at most.

    Late events are made up for. A message that is none of this kind ends the run by ValueError.
    """
    words = run.input.text.split()
    if len(words) != 3:
        raise ValueError('say "<seconds> <events per second> <first delay in ms>"')
    seconds, rate, delay_ms = map(float, words)
    if not (0 < seconds <= MOST_S and rate >= 0 and delay_ms >= 0):
        raise ValueError(f"0 to {MOST_S:g} seconds, and nothing below 0")
    await asyncio.sleep(delay_ms / 1000)
    begin = time.monotonic()
    number = 0
    while True:
        now = time.monotonic() - begin
        if rate:
            due = number / rate
            if due >= seconds:
                break
            if due > now:
                await asyncio.sleep(due - now)
        elif now >= seconds:
            break
        await run.emit("load", {"at": time.time_ns(), "text": PADDING})
        number += 1
    return f"{number} events"
