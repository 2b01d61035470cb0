"""The registry's question for the largest fence in the log, and the answer (P18).

A registry that has just started grants nothing before it knows that fence. Guarantees: every
question is answered as soon as the log is there; questions that come while one is being
answered are answered with it.
"""

import asyncio
import logging
from collections.abc import Callable

from agent_service.log.port import EventLog
from steward.errors import StewardError
from steward.model.keys import Epoch
from steward.telemetry.logs import fields

ATTEMPT_S = 2.0
RETRY_S = 0.25

_log = logging.getLogger(__name__)


class LogHead:
    """Answers by `report`. `run` as one task; `asked` at each question."""

    def __init__(self, log: EventLog, report: Callable[[Epoch], None]) -> None:
        self._log = log
        self._report = report
        self._asked = asyncio.Event()

    def asked(self) -> None:
        """The registry wants to know."""
        self._asked.set()

    async def run(self) -> None:
        """Answer until cancelled. Raises LogFailed when the log failed for good."""
        while True:
            await self._asked.wait()
            try:
                async with asyncio.timeout(ATTEMPT_S):
                    summary = await self._log.describe()
            except (StewardError, TimeoutError) as error:
                _log.info("the log can't be asked for its head", extra=fields(why=str(error)))
                await asyncio.sleep(RETRY_S)
                continue
            self._asked.clear()
            self._report(Epoch(summary.largest_fence))
