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
    # One store transaction: what is waiting, at most this many operations, and no more than the
    # engine takes (`StoreView.most_operations`).
    batch_operations: int = 512
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
    # Users that one node is handing off at a time, and how long it has for one before it is asked
    # again and the next one's turn comes.
    handoffs_at_once: int = 32
    handoff_wait_ms: int = 60_000
    # Placements of a draining node that are read at a time.
    list_page: int = 512
    # An operator's move is refused, and an evicted placement removed, when the node took longer.
    # Longer than a node gives to open calls (`agent.drain_runs_ms`), or it is refused and done.
    move_wait_ms: int = 15_000
    evict_wait_ms: int = 2_000
    # A node that can't reach the log, while others can, is fenced after this long.
    log_away_ms: int = 1_000
    # Whether grants wait for the log's largest fence (P18), and how long one node is asked for it.
    log_floor: bool = True
    log_head_wait_ms: int = 1_000
    # Tenants whose users wait until a suspected node has stopped for sure, and how much longer
    # than its lease that takes.
    strict_tenants: frozenset[str] = frozenset()
    hold_margin_ms: int = 500
    # Orphans that are placed at a time, and how many may wait; more come again by themselves.
    adopt_at_once: int = 32
    most_orphans: int = 65_536

    @property
    def stale_ms(self) -> int:
        return self.beat_ms * self.missed_beats
