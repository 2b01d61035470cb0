"""Agents that try to get what a user wrote into the logs."""

import logging

from steward.agent import Run


async def leaky(run: Run) -> str:
    """Says, calls and raises with the text of the message."""
    text = run.input.text
    await run.think(text)
    await run.say(text)

    async def fail(text: str) -> None:
        raise ValueError(text)

    try:
        await run.tool(f"fail {text[:8]}", {"text": text}, fail)
    except ValueError:
        logging.getLogger("an.agent").warning("an agent's own line")
    raise RuntimeError(text)
