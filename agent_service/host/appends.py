"""The way of appends to the log and of its outcomes back, one user at a time.

Guarantees: every append ends in exactly one `FinishAppend`, or ends the node; what the
log refuses is reported with how long this process stood still before, since that is how long two
managers may have executed. It never repeats an append: that is the log's side of the port.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

from agent_service.core.commands import Command, Fence, FinishAppend
from agent_service.core.effects import WriteAppend
from agent_service.core.journal import AppendOutcome, Conflict, Fenced
from agent_service.core.manager import Manager
from agent_service.log.port import EventLog, LogFull
from steward.model.keys import Epoch
from steward.model.verbs import EventType
from steward.model.violations import ViolationKind
from steward.telemetry.catalog import AgentMetrics

_log = logging.getLogger(__name__)

Refused = Callable[[Manager, ViolationKind, str], None]


class Appends:
    """Sends the appends of all managers of a node."""

    def __init__(
        self,
        log: EventLog,
        metrics: AgentMetrics,
        tell: Callable[[Manager, Command], None],
        refused: Refused,
        failed: Callable[[BaseException], None],
    ) -> None:
        """`tell` gives a manager a command; `refused` reports; `failed` ends the node."""
        self._log = log
        self._metrics = metrics
        self._tell = tell
        self._refused = refused
        self._failed = failed
        self._count_event = {type: metrics.events.labels(type=type.value) for type in EventType}

    def write(self, live: Manager, effect: WriteAppend) -> None:
        """Send one append."""
        for type in effect.types:
            self._count_event[type].inc()
        try:
            future = self._log.append(effect.append)
        except LogFull:
            # It was never sent, so ending this manager loses nothing that was promised.
            _log.error("the event log takes no more work; a manager is ended")
            self._tell(live, Fence(Epoch(0)))
            return
        number = effect.append.append_number
        future.add_done_callback(partial(self._appended, live, number, time.monotonic()))

    def _appended(
        self, live: Manager, number: int, started: float, future: "asyncio.Future[AppendOutcome]"
    ) -> None:
        if future.cancelled():
            return
        failure = future.exception()
        if failure is not None:
            self._failed(failure)
            return
        self._metrics.append_seconds.observe(time.monotonic() - started)
        outcome = future.result()
        if isinstance(outcome, Fenced):
            evidence = f"append={number} fence={outcome.fence}"
            self._refused(live, ViolationKind.STALE_APPEND, evidence)
        elif isinstance(outcome, Conflict):
            evidence = f"append={number} next={outcome.next_sequence}"
            self._refused(live, ViolationKind.APPEND_CONFLICT, evidence)
        self._tell(live, FinishAppend(number, outcome))
