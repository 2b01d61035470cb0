"""Sees an agent that blocks the agent loop, from the host's loop, which it can't block.

A ping crosses to the agent loop every `PERIOD_S`; how long it waits there is the lag
that is measured. One that is not answered within `BLOCKED_S` is a warning with the stack
of the agent thread, once per blockage. Nothing is interrupted: Python can't.
"""

import asyncio
import logging
import sys
import threading
import time
import traceback

from steward.telemetry.catalog import AgentMetrics
from steward.telemetry.logs import fields

PERIOD_S = 0.25
BLOCKED_S = 1.0
MAX_FRAMES = 20

_log = logging.getLogger(__name__)


class AgentWatchdog:
    """Watches one agent loop that runs in `thread`. `watch` is a task of the host's loop."""

    def __init__(
        self, agent_loop: asyncio.AbstractEventLoop, thread: threading.Thread, metrics: AgentMetrics
    ) -> None:
        self._agent_loop = agent_loop
        self._thread = thread
        self._lag = metrics.agent_loop_lag

    async def watch(self) -> None:
        """Ping until cancelled, or until the agent loop is closed."""
        host_loop = asyncio.get_running_loop()
        while True:
            answered: asyncio.Future[float] = host_loop.create_future()
            asked = time.monotonic()
            try:
                self._agent_loop.call_soon_threadsafe(self._answer, host_loop, answered, asked)
            except RuntimeError:
                return
            done, _ = await asyncio.wait({answered}, timeout=BLOCKED_S)
            if not done:
                _log.warning(
                    "agent code blocks the agent loop; make it async, or a plain def",
                    extra=fields(
                        blocked_s=BLOCKED_S, run=self._current_task(), where=self._stack()
                    ),
                )
            lag = await answered
            self._lag.observe(lag)
            if not done:
                _log.warning("the agent loop goes on", extra=fields(blocked_s=round(lag, 1)))
            await asyncio.sleep(PERIOD_S)

    @staticmethod
    def _answer(
        host_loop: asyncio.AbstractEventLoop, answered: "asyncio.Future[float]", asked: float
    ) -> None:
        def settle(lag: float) -> None:
            if not answered.done():
                answered.set_result(lag)

        try:
            host_loop.call_soon_threadsafe(settle, time.monotonic() - asked)
        except RuntimeError:
            return

    def _current_task(self) -> str:
        task = asyncio.current_task(self._agent_loop)
        return task.get_name() if task is not None else "none"

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0)
        if frame is None:
            return "(the agent thread has ended)"
        return "".join(traceback.format_stack(frame)[-MAX_FRAMES:]).rstrip()
