"""`Reach`: whether this edge can reach one node, told by what comes back and by nothing else.

A stream that is open proves nothing: the process behind it may be stopped, or something
in between may swallow its bytes. So a probe is sent that takes the way of every event; while
none is under way that had to come back, or anything at all came in, the node is *proven*.

It guarantees: silence is counted only while this process itself runs (one step of it counts
at most `MOST_STEP_MS`), so that an edge that was paused suspects nobody; a suspicion is told
again and again, since the registry needs it fresh; a stream that was silent for
`DEAD_STREAM_MS` is closed, and begins anew. It decides nothing about the node: that is the
registry's.

Pure: the driver calls `tick` every `PROBE_MS`, also while there is no stream.
"""

from dataclasses import dataclass
from typing import Final

PROBE_MS: Final = 250
SILENT_MS: Final = 2 * PROBE_MS
DEAD_STREAM_MS: Final = 2_000
# Longer than a lease: whoever is dead was fenced by then, and its users have their next
# manager here. What is left is the node that only this edge can't reach.
GIVEN_UP_MS: Final = 7_000
MOST_STEP_MS: Final = PROBE_MS * 3 // 2


@dataclass(frozen=True, slots=True)
class SendProbe:
    number: int


@dataclass(frozen=True, slots=True)
class Suspect:
    """Tell the registry that this edge can't reach the node."""

    evidence: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """For `GIVEN_UP_MS` nothing came: this edge can't serve the users of that node."""


@dataclass(frozen=True, slots=True)
class CloseStream:
    """The stream is open and dead."""


Effect = SendProbe | Suspect | GiveUp | CloseStream


class Reach:
    """One node, over all streams to it. Begins unproven and unsuspected."""

    __slots__ = ("_heard", "_last_ms", "_open", "_sent", "_stream_ms", "proven", "silent_ms")

    def __init__(self, now_ms: int) -> None:
        self.proven = False
        # For how long nothing came although something should have.
        self.silent_ms = 0
        # The part of it that falls to the present stream.
        self._stream_ms = 0
        self._last_ms = now_ms
        self._open = False
        self._heard = False
        # Number of the last probe; 0 while every probe of this stream came back.
        self._sent = 0

    @property
    def given_up(self) -> bool:
        return self.silent_ms >= GIVEN_UP_MS

    def opened(self, number: int) -> list[Effect]:
        """A stream is up: it has to prove itself. `number` is for its first probe."""
        self._open = True
        self._heard = False
        self._stream_ms = 0
        self._sent = number
        return [SendProbe(number)]

    def closed(self) -> None:
        """The stream is over."""
        self._open = False
        self.proven = False
        self._sent = 0

    def heard(self) -> None:
        """Something came in. Of a stream that proved itself before, that is proof enough."""
        if self.proven:
            self._heard = True

    def echoed(self, number: int) -> None:
        """A probe came back."""
        if number == self._sent:
            self._sent = 0
            self._heard = True
            self.proven = True
            self.silent_ms = 0

    def tick(self, now_ms: int, number: int) -> list[Effect]:
        """One step of time. `number` is for a probe, and higher than all before."""
        step_ms = min(max(now_ms - self._last_ms, 0), MOST_STEP_MS)
        self._last_ms = now_ms
        heard, self._heard = self._heard, False
        if heard:
            self.silent_ms = self._stream_ms = 0
        elif not self._open or self._sent:
            self.silent_ms += step_ms
            self._stream_ms += step_ms
        if self._open and not self._sent and not heard:
            # Traffic is as good as a probe; only a quiet stream is asked.
            self._sent = number
            return [SendProbe(number)]
        if self.silent_ms < SILENT_MS:
            return []
        self.proven = False
        what = "the stream carries nothing" if self._open else "no stream can be opened"
        effects: list[Effect] = [Suspect(f"{what} for {self.silent_ms} ms")]
        if self._open and self._stream_ms >= DEAD_STREAM_MS:
            effects.append(CloseStream())
        if self.given_up:
            effects.append(GiveUp())
        return effects
