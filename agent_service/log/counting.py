"""What a group commit adds to the metrics. Children are resolved once; counting is per group."""

from collections import Counter

from agent_service.core.journal import Append, Committed, Conflict, Fenced, Sealed
from agent_service.log.port import Operation
from agent_service.log.writer import Group
from steward.telemetry.catalog import LogMetrics

STALE_APPEND = "stale_append"
STALE_SEAL = "stale_seal"


class CommitCounter:
    """Counts groups. Any thread, one at a time."""

    def __init__(self, metrics: LogMetrics) -> None:
        self._events = metrics.appended
        self._seconds = metrics.commit_seconds
        self._size = metrics.commit_appends
        self._appends = {
            Committed: metrics.appends.labels("committed"),
            Fenced: metrics.appends.labels("fenced"),
            Conflict: metrics.appends.labels("conflict"),
        }
        self._repeated = metrics.appends.labels("repeated")
        self._sealed = metrics.seals.labels("sealed")
        self._unsealed = metrics.seals.labels("fenced")
        self._stale_append = metrics.refusals.labels(STALE_APPEND)
        self._stale_seal = metrics.refusals.labels(STALE_SEAL)

    def count(self, operations: list[Operation], group: Group, seconds: float) -> None:
        """Add one committed group that took `seconds`."""
        self._seconds.observe(seconds)
        self._events.inc(group.events)
        appended: Counter[type] = Counter()
        sealed: Counter[type] = Counter()
        for operation, outcome in zip(operations, group.outcomes, strict=True):
            (appended if type(operation) is Append else sealed)[type(outcome)] += 1
        appends = appended.total()
        if appends:
            self._size.observe(appends)
        for kind, child in self._appends.items():
            number = appended[kind]
            if kind is Committed:
                number -= group.repeated
            if number:
                child.inc(number)
        if group.repeated:
            self._repeated.inc(group.repeated)
        if sealed[Sealed]:
            self._sealed.inc(sealed[Sealed])
        if sealed[Fenced]:
            self._unsealed.inc(sealed[Fenced])
            self._stale_seal.inc(sealed[Fenced])
        refused = appended[Fenced] + appended[Conflict]
        if refused:
            self._stale_append.inc(refused)
