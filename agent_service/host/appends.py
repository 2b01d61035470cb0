"""The way of appends to the log and of its outcomes back, for all managers of a node at once.

What the steps of one turn want stored is submitted together, and the outcomes come back
together: no future, no callback and no wake-up for each.

Guarantees: every append ends in exactly one `FinishAppend`, or ends the node; what the
log refuses is reported with how long this process stood still before, since that is how long two
managers may have executed. It never repeats an append: that is the log's side of the port.
"""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from agent_service.core.commands import Command, Fence, FinishAppend
from agent_service.core.effects import WriteAppend
from agent_service.core.journal import Append, AppendOutcome, Committed, Conflict, Fenced
from agent_service.core.manager import Manager
from agent_service.host.turn import Turn
from agent_service.log.port import EventLog, LogFailed, LogFull, Outcome
from agent_service.log.rules import check_append
from steward.model.keys import Epoch
from steward.model.verbs import EventType
from steward.model.violations import ViolationKind
from steward.telemetry.catalog import AgentMetrics
from steward.telemetry.instruments import exemplar_of
from steward.telemetry.logs import fields

_log = logging.getLogger(__name__)

Refused = Callable[[Manager, ViolationKind, str], None]
Sent = list[tuple[Manager, Append]]


class Appends:
    """Sends the appends of all managers of a node."""

    def __init__(
        self,
        log: EventLog,
        metrics: AgentMetrics,
        turn: Turn,
        silent: Callable[[], bool],
        tell: Callable[[Manager, Command], None],
        refused: Refused,
        failed: Callable[[BaseException], None],
    ) -> None:
        """`silent`: whether this node may act no more; `tell` gives a manager a command within
        a turn; `refused` reports; `failed` ends the node."""
        self._log = log
        self._metrics = metrics
        self._turn = turn
        self._silent = silent
        self._tell = tell
        self._refused = refused
        self._failed = failed
        self._collected: Sent = []
        self._size = 0
        self._types: dict[EventType, int] = {}
        # Sent, and without an outcome.
        self._waiting = 0
        metrics.waiting_appends.set_function(lambda: self._waiting)
        self._count_event = {type: metrics.events.labels(type=type.value) for type in EventType}
        turn.ends_with(self._send)

    def write(self, live: Manager, effect: WriteAppend) -> None:
        """Send one append, together with the others of this turn."""
        self._size += check_append(effect.append)
        types = self._types
        for type in effect.types:
            types[type] = types.get(type, 0) + 1
        self._collected.append((live, effect.append))
        self._turn.collected()

    def _send(self) -> None:
        sent, self._collected = self._collected, []
        if not sent:
            return
        size, self._size = self._size, 0
        for type, number in self._types.items():
            self._count_event[type].inc(number)
        self._types.clear()
        try:
            self._log.submit(
                [append for _, append in sent],
                size,
                partial(self._answered, sent, time.monotonic()),
            )
        except LogFull:
            # It was never sent, so ending these managers loses nothing that was promised.
            _log.error(
                "the event log takes no more work; managers are ended",
                extra=fields(managers=len(sent), do="see why the log is slow or away; it is full"),
            )
            for live, _ in sent:
                self._tell(live, Fence(Epoch(0)))
            return
        self._waiting += len(sent)

    def _answered(
        self, sent: Sent, started: float, outcomes: Sequence[Outcome] | LogFailed
    ) -> None:
        self._waiting -= len(sent)
        if isinstance(outcomes, LogFailed):
            self._failed(outcomes)
            return
        # Once for what was sent together, as it came back together.
        traces = sent[0][1].traces
        exemplar = exemplar_of(traces[0][1]) if traces else None
        self._metrics.append_seconds.observe(time.monotonic() - started, exemplar)
        silent = self._silent()
        with self._turn:
            for (live, append), outcome in zip(sent, outcomes, strict=True):
                if type(outcome) is not Committed:
                    # Also by a node that is over: it may be the last one to tell.
                    self._report(live, append.append_number, outcome)
                if not silent:
                    finish = FinishAppend(append.append_number, cast(AppendOutcome, outcome))
                    self._tell(live, finish)

    def _report(self, live: Manager, number: int, outcome: Outcome) -> None:
        if isinstance(outcome, Fenced):
            evidence = f"append={number} fence={outcome.fence}"
            self._refused(live, ViolationKind.STALE_APPEND, evidence)
        elif isinstance(outcome, Conflict):
            evidence = f"append={number} next={outcome.next_sequence}"
            self._refused(live, ViolationKind.APPEND_CONFLICT, evidence)
