"""The agent of `growth_users`: it emits at a period, in its turn of the clock that all share."""

import asyncio
import time

from steward.agent import Run

PADDING = "x" * 64
TURN_S = 3.0


def turn_of(now: float, turns: int) -> int:
    """Whose turn it is at `now` of `time.monotonic`, which all processes of a machine share."""
    return int(now / TURN_S) % turns


async def metronome(run: Run) -> None:
    """`"<period in ms> <phase in ms> <turn> <turns>"`: silent when it is the turn of others."""
    period_ms, phase_ms, turn, turns = map(int, run.input.text.split())
    # By the clock, not by the start of the run: so the events of all are spread evenly.
    due = time.monotonic() // (period_ms / 1000) * (period_ms / 1000) + phase_ms / 1000
    while True:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        if turn_of(due, turns) == turn:
            await run.emit("tick", {"text": PADDING})
        due += period_ms / 1000
