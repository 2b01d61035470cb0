"""The numbers of the `Registry` machine, all in one value. Times are milliseconds."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """Defaults are those of the design; tests and settings replace single fields.

    A node is *stale* after `beat_ms * missed_beats` without a beat: the 750 ms of the joining rule.
    """

    registry_id: str = "registry"
    ttl_ms: int = 5_000
    beat_ms: int = 250
    missed_beats: int = 3
    # A resolve waits this long for a node, a release or the store, then it is refused.
    resolve_wait_ms: int = 2_000
    retry_after_ms: int = 1_000
    # One store transaction: what is waiting, at most this many operations.
    batch_operations: int = 100
    batches_in_flight: int = 2
    # Placements remembered; the oldest are forgotten first, and asked of the store when needed.
    cached_placements: int = 262_144
    # Users whose resolve waits; above this they are refused at once.
    most_waiting: int = 65_536
    # A node whose stream broke is dialled again after these times, doubling.
    redial_first_ms: int = 50
    redial_most_ms: int = 500
    # How long an edge's report of an unreachable node counts as a second observer.
    report_window_ms: int = 2_000
    # A tick later than this means that this process was paused: a grace begins.
    paused_after_ms: int = 1_000

    @property
    def stale_ms(self) -> int:
        return self.beat_ms * self.missed_beats
