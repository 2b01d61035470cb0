"""What every process watches of itself: how late its loop is, and how long the collector took."""

from steward.telemetry.catalog import ServiceMetrics
from steward.telemetry.gc_pauses import GcPauses
from steward.telemetry.lag import LagProbe


class ProcessProbes:
    """The probes of one process, on its running loop."""

    __slots__ = ("_gc_pauses", "_lag")

    def __init__(self, metrics: ServiceMetrics) -> None:
        self._lag = LagProbe(metrics.loop_lag)
        self._gc_pauses = GcPauses(metrics.gc_pauses)

    def start(self) -> None:
        """Begin on the running loop. Safe to call twice."""
        self._lag.start()
        self._gc_pauses.start()

    def stop(self) -> None:
        """End. Safe to call twice."""
        self._lag.stop()
        self._gc_pauses.stop()

    def take_worst(self) -> float:
        """The greatest lag of the loop in seconds since the last call, for beats."""
        return self._lag.take_worst()
