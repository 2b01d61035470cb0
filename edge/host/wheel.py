"""One timer wheel for all deadlines of an edge: connections and attachments alike.

An item has at most one slot that counts. Setting a later deadline costs nothing: the item
is woken early, finds nothing due, and asks for its next slot. So traffic that moves a
heartbeat's deadline on with each event never touches the wheel. Resolution is one tick;
deadlines are never early by more than that and late by at most one.
"""

from typing import Protocol

TICK_MS = 25


class Timed(Protocol):
    """Something with deadlines. `wheel_slot` belongs to the wheel; it starts as 0."""

    wheel_slot: int

    def on_deadline(self, now_ms: int) -> None:
        """A deadline may have passed. The item schedules its next one itself."""
        ...


class TimerWheel:
    """Slots of `TICK_MS`; driven by whoever calls `advance`."""

    __slots__ = ("_slots", "_turned")

    def __init__(self, now_ms: int) -> None:
        self._turned = now_ms // TICK_MS
        self._slots: dict[int, list[Timed]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))

    def schedule(self, item: Timed, deadline_ms: int) -> None:
        """Wake `item` at the deadline, unless it is to be woken before that anyway."""
        slot = max(-(-deadline_ms // TICK_MS), self._turned + 1)
        if item.wheel_slot and item.wheel_slot <= slot:
            return
        item.wheel_slot = slot
        self._slots.setdefault(slot, []).append(item)

    def advance(self, now_ms: int) -> None:
        """Wake what is due at `now_ms`."""
        target = now_ms // TICK_MS
        if target - self._turned > len(self._slots):
            due = sorted(slot for slot in self._slots if slot <= target)
        else:
            due = [s for s in range(self._turned + 1, target + 1) if s in self._slots]
        self._turned = max(target, self._turned)
        for slot in due:
            for item in self._slots.pop(slot):
                if item.wheel_slot == slot:
                    item.wheel_slot = 0
                    item.on_deadline(now_ms)
