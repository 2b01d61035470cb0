"""Carries out what managers ask for: appends, deliveries, answers, runs, counters.

Effects are carried out in the order in which a manager gave them. The end of a manager is the
host's own affair, and is handed to it.
"""

from collections.abc import Callable, Iterable

from agent_service.core.effects import (
    AcknowledgeVerbs,
    AnswerAccepted,
    AnswerAttached,
    AnswerCancelled,
    AnswerRefused,
    CountRun,
    Deliver,
    Effect,
    EndManager,
    ObserveMove,
    StartRun,
    StopRun,
    TellClientTaken,
    WriteAppend,
)
from agent_service.core.manager import HANDOFF, Manager
from agent_service.host.appends import Appends
from agent_service.host.edges import EdgeStreams
from agent_service.host.run_starts import RunStarts
from agent_service.host.spans import HostSpans
from steward.telemetry.catalog import AgentMetrics


class Performer:
    """One for all managers of a node."""

    def __init__(
        self,
        appends: Appends,
        edges: EdgeStreams,
        runs: RunStarts,
        spans: HostSpans,
        metrics: AgentMetrics,
        ended: Callable[[Manager, EndManager], None],
        run_ended: Callable[[], None],
    ) -> None:
        self._edges = edges
        self._runs = runs
        self._spans = spans
        self._metrics = metrics
        self._run_ended = run_ended
        self._by_type: dict[type, Callable[[Manager, Effect], None]] = {
            WriteAppend: spans.writing(appends.write),  # type: ignore[dict-item]
            Deliver: spans.delivering(edges.deliver),  # type: ignore[dict-item]
            AnswerAttached: edges.answer,  # type: ignore[dict-item]
            AnswerAccepted: self._accepted,  # type: ignore[dict-item]
            AnswerCancelled: edges.answer,  # type: ignore[dict-item]
            AnswerRefused: self._refused,  # type: ignore[dict-item]
            TellClientTaken: edges.client_taken,  # type: ignore[dict-item]
            StartRun: self._start_run,  # type: ignore[dict-item]
            StopRun: self._stop_run,  # type: ignore[dict-item]
            CountRun: self._count_run,  # type: ignore[dict-item]
            ObserveMove: self._observe_move,  # type: ignore[dict-item]
            AcknowledgeVerbs: runs.acknowledge,  # type: ignore[dict-item]
            EndManager: ended,  # type: ignore[dict-item]
        }

    def perform(self, live: Manager, effects: Iterable[Effect]) -> None:
        """Carry out the effects of one step."""
        for effect in effects:
            self._by_type[type(effect)](live, effect)

    def _accepted(self, live: Manager, effect: AnswerAccepted) -> None:
        self._spans.accepted(live.user, live.epoch, effect)
        self._edges.answer(live, effect)

    def _refused(self, live: Manager, effect: AnswerRefused) -> None:
        self._spans.refused(live.epoch, effect)
        self._edges.answer(live, effect)

    def _start_run(self, live: Manager, effect: StartRun) -> None:
        self._runs.start(live, self._spans.run_started(live, effect))

    def _stop_run(self, live: Manager, effect: StopRun) -> None:
        self._runs.stop(effect.key)

    def _count_run(self, live: Manager, effect: CountRun) -> None:
        self._spans.run_ended(effect.key, effect.outcome)
        self._metrics.runs_total.labels(outcome=effect.outcome.value).inc()
        self._run_ended()

    def _observe_move(self, live: Manager, effect: ObserveMove) -> None:
        metrics = self._metrics
        handoff = effect.cause == HANDOFF
        gaps = metrics.handoff_gap_seconds if handoff else metrics.failover_gap_seconds
        gaps.observe(effect.gap_ms / 1000)
