"""What every Python peer does: take orders on stdin and end with it. Uses no package.

The peers run in an environment without Steward, as scripts beside this file.
"""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable

TEXT = sys.argv[1] if len(sys.argv) > 1 else ""
"""What is pushed."""

BACKLOG = 4096


async def obey(port: int, push: Callable[[int], Awaitable[None]]) -> None:
    """Print the port, then obey until stdin ends, and end the process with it.

    `push(burst)` sends so many frames to every client, one client after the other.
    """
    loop = asyncio.get_running_loop()
    print(f"port {port}", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        word, turns, burst = line.split()
        if word != "push":
            os._exit(2)
        for _ in range(int(turns)):
            await push(int(burst))
            await asyncio.sleep(0)
        print("pushed", flush=True)
    os._exit(0)
